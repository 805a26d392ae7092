"""Drafts without a model: recent verified texts indexed by suffix, so that what followed a phrase before can be proposed
again, after SuffixDecoding (https://arxiv.org/abs/2411.04975). It knows nothing of models: tokens are ids from 0 to 2³¹ - 1.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from hf_osd.system.forks import on_fork

ORDERS = (1, 2, 4)  # lengths of the phrases that are indexed; the longest is looked up first
MOST_OCCURRENCES = 16  # of one phrase, the most recent, that a lookup weighs
LONGEST_MATCH = 32  # tokens; beyond it a match counts as no better
BORDER = -1  # stands around every text and equals no token, so that no comparison runs on into another text

# What `nbytes` counts, in CPython's sizes. A token: its place in the log and in three chains, 4 bytes each and a sixteenth
# more that arrays allocate ahead. A phrase: up to 48 bytes of key, up to 32 of position, and its room in the dict, which
# is 30 to 120 bytes as the dict grows and at most 140 after texts have gone. A cache: empty dicts, arrays and the lock.
TOKEN_BYTES = 18
PHRASE_BYTES = 160
CACHE_BYTES = 2048
MOST_ROOM = 140


@dataclass(frozen=True)
class Continuation:
    """What followed the longest match of a text's end.

    Args:
        tokens (`list[int]`): the proposed tokens, at least one.
        match (`int`): how many of the text's last tokens matched, at most 32.
        shares (`list[float]`): for each token, the share, in (0, 1], of the occurrences that had it, among those that agreed
            with all tokens before it and went on.
    """

    tokens: list[int]
    match: int
    agreement: list[float]


class SuffixCache:
    """One tenant's recent texts, bounded by bytes; the oldest texts go first. Threads may share it.

    Args:
        max_bytes (`int`): bound on `nbytes`. Of a text longer than `(max_bytes - 2048) // 498` tokens only the last part
            is kept: that much fits whatever its phrases are.

    Raises:
        ValueError: if `max_bytes` is below 1.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = _checked(max_bytes)
        self._longest = (max_bytes - CACHE_BYTES) // (TOKEN_BYTES + len(ORDERS) * PHRASE_BYTES)
        self._index = _Index()
        self._lengths: deque[int] = deque()  # of the texts held, the oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Tokens held."""
        with self._lock:
            return sum(self._lengths)

    @property
    def nbytes(self) -> int:
        """Estimated bytes: 18 a token and 160 a distinct phrase of 1, 2 or 4 tokens, and 2048 once unless nothing is held."""
        with self._lock:
            return self._nbytes()

    def add(self, tokens: Sequence[int]):
        """Take one ended request's text, prompt and answer."""
        kept = array("i", tokens[-self._longest :])  # a token that is none raises here, before anything has changed
        if self._longest < 1 or not len(kept):
            return
        with self._lock:
            self._index.begin()
            self._index.extend(kept)
            self._lengths.append(len(kept))
            while self._nbytes() > self.max_bytes:
                self._index.drop_oldest(self._lengths.popleft())
            self._index.give_room_back()

    def clear(self):
        """Forget everything."""
        with self._lock:
            self._index = _Index()
            self._lengths.clear()

    def continuation(self, suffix: Sequence[int], most: int) -> Continuation | None:
        """What followed the longest match of the end of `suffix`: up to `most` tokens, or None where nothing matched."""
        return self._longer(list(suffix[-LONGEST_MATCH:]), most, 0)

    def _longer(self, suffix: list[int], most: int, match: int) -> Continuation | None:
        """The continuation, if its match is longer than `match`."""
        with self._lock:
            found, longest = self._index.find(suffix)
            return self._index.follow(found, longest, most) if longest > match else None

    def _nbytes(self) -> int:
        return CACHE_BYTES + self._index.nbytes if self._lengths else 0


class CallSuffixes:
    """The text of one running call, which finds its own phrases again and those of its tenant's cache. Only one thread at
    a time may use it.

    Args:
        tokens (`Sequence[int]`): the prompt.
        cache (`SuffixCache`, *optional*): earlier texts. It is read only: who ends the call adds the text.
    """

    def __init__(self, tokens: Sequence[int], cache: SuffixCache | None = None):
        self._index, self._cache = _Index(), cache
        self._index.begin()
        self._index.extend(tokens)

    @property
    def tokens(self) -> list[int]:
        """The prompt and every verified token since."""
        return self._index.last(sys.maxsize)

    def extend(self, tokens: Sequence[int]):
        """Append verified tokens."""
        self._index.extend(tokens)

    def continuation(self, most: int, tail: Sequence[int] = ()) -> Continuation | None:
        """What followed the longest match of the text's end, in this text or in the cache; of equal matches this text's.

        Args:
            most (`int`): the most tokens to propose.
            tail (`Sequence[int]`): drafted tokens, taken as though the text went on with them, and not stored.

        Returns:
            `Continuation`: or None where nothing matched.
        """
        index = self._index
        # What follows the tail is accepted only if the tail is, and then the tail is text like the rest.
        index.extend(tail)
        try:
            suffix = index.last(LONGEST_MATCH)
            found, match = index.find(suffix)
            if self._cache is not None and match < LONGEST_MATCH:
                cached = self._cache._longer(suffix, most, match)
                if cached is not None:
                    return cached
            return index.follow(found, match, most, loops=True)
        finally:
            index.shorten(len(tail))


class SuffixCaches:
    """A [`SuffixCache`] for each tenant, under one bound. Threads may share it.

    Args:
        max_bytes (`int`): bound on the bytes of all tenants, and so of each. Beyond it the least recently used tenants,
            by `of` or `add`, lose all their texts.

    Raises:
        ValueError: if `max_bytes` is below 1.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = _checked(max_bytes)
        self._nbytes = 0
        # A cache lives while it holds texts or somebody holds it: callers hold the same one after it has lost its texts, and
        # tenants who never add anything leave nothing behind.
        self._known: WeakValueDictionary[Hashable, _TenantCache] = WeakValueDictionary()
        self._filled: OrderedDict[_TenantCache, int] = OrderedDict()  # to their bytes, the least recently used first
        self._lock = threading.Lock()
        on_fork(self)

    @property
    def nbytes(self) -> int:
        """Estimated bytes of all tenants."""
        return self._nbytes

    def of(self, tenant: Hashable) -> SuffixCache:
        """The cache of this tenant; `None` is the tenant of calls that name none."""
        with self._lock:
            cache = self._known.get(tenant)
            if cache is None:
                cache = self._known[tenant] = _TenantCache(self)
            elif cache in self._filled:
                self._filled.move_to_end(cache)
            return cache

    def clear(self):
        """Forget everything of every tenant."""
        with self._lock:
            while self._filled:
                self._drop_oldest()

    def after_fork(self):
        """In a forked child: what another thread was changing is empty there."""
        self._lock = threading.Lock()
        for cache in list(self._known.values()):
            if cache._lock.locked():
                cache._index, cache._lengths, cache._lock = _Index(), deque(), threading.Lock()

    def _changed(self, cache: _TenantCache):
        with self._lock:
            self._nbytes -= self._filled.pop(cache, 0)
            nbytes = cache.nbytes
            if nbytes:
                self._filled[cache] = nbytes
                self._nbytes += nbytes
            while self._nbytes > self.max_bytes:
                self._drop_oldest()

    def _drop_oldest(self):
        cache, nbytes = self._filled.popitem(last=False)
        self._nbytes -= nbytes
        SuffixCache.clear(cache)  # the tenant's own would report back, and wait for the lock held here


class _TenantCache(SuffixCache):
    """Reports its size. Its own lock is free when it does: `SuffixCaches` takes that one inside its own."""

    def __init__(self, owner: SuffixCaches):
        super().__init__(owner.max_bytes)
        self._owner = owner

    def add(self, tokens: Sequence[int]):
        super().add(tokens)
        self._owner._changed(self)

    def clear(self):
        super().clear()
        self._owner._changed(self)


class _Index:
    """Texts in one log with a border around each, and for every phrase the places it was followed at. No lock of its own.

    A place is where a phrase's continuation begins, so the end of a text, which nothing follows yet, is never found. Places
    count from the first text ever held: `place - base` is the index in the log. For each order a dict gives a phrase's most
    recent place, and an array beside the log the distance from there to the one before, 0 if there was none. So adding,
    taking back and dropping the oldest cost the same however often a phrase occurs.
    """

    def __init__(self):
        self._log = array("i", [BORDER])
        self._base = 0
        self._start = 0  # index of the newest text's first token
        self._orders: list[tuple[dict[int, int], array]] = [({}, array("i", [0])) for _ in ORDERS]

    @property
    def nbytes(self) -> int:
        return TOKEN_BYTES * len(self._log) + PHRASE_BYTES * sum(len(heads) for heads, _ in self._orders)

    def begin(self):
        """Begin a text."""
        self._start = len(self._log)
        self._log.append(BORDER)
        for _, backs in self._orders:
            backs.append(0)

    def extend(self, tokens: Sequence[int]):
        """Lengthen the newest text."""
        new = array("i", tokens)
        log, first, zeros = self._log, len(self._log) - 1, array("i", bytes(new.itemsize * len(new)))
        new.append(BORDER)
        log[first:] = new
        for _, backs in self._orders:
            backs.extend(zeros)
        for at in range(first, len(log) - 1):
            place = at + self._base
            for (heads, backs), phrase in zip(self._orders, _phrases(log, self._start, at), strict=False):
                backs[at] = place - heads.get(phrase, place)
                heads[phrase] = place

    def shorten(self, count: int):
        """Undo `extend` for the last `count` tokens of the newest text."""
        log, end = self._log, len(self._log) - 1
        for at in reversed(range(end - count, end)):
            for (heads, backs), phrase in zip(self._orders, _phrases(log, self._start, at), strict=False):
                if backs[at]:
                    heads[phrase] -= backs[at]
                else:
                    del heads[phrase]
        for column in (log, *(backs for _, backs in self._orders)):
            del column[end - count : end]

    def drop_oldest(self, length: int):
        """Forget the oldest text, of `length` tokens."""
        for at in range(1, length + 1):
            for (heads, _), phrase in zip(self._orders, _phrases(self._log, 1, at), strict=False):
                if heads[phrase] == at + self._base:
                    del heads[phrase]
        for column in (self._log, *(backs for _, backs in self._orders)):
            del column[: length + 1]
        self._base += length + 1

    def give_room_back(self):
        """Rebuild the dicts that have become too wide for what they hold: Python narrows none by itself."""
        for i, (heads, backs) in enumerate(self._orders):
            if sys.getsizeof(heads) > MOST_ROOM * len(heads):
                self._orders[i] = dict(heads), backs

    def last(self, count: int) -> list[int]:
        """The newest text's last tokens, at most `count`."""
        end = len(self._log) - 1
        return self._log[max(self._start, end - count) : end].tolist()

    def find(self, suffix: list[int]) -> tuple[list[int], int]:
        """The indices that continue the longest match of the suffix's end, the most recent first, and its length; `[], 0`
        where nothing matches."""
        log, base, found, match = self._log, self._base, [], 0
        phrases = _phrases(suffix, 0, len(suffix))
        for i in reversed(range(len(phrases))):
            heads, backs = self._orders[i]
            if phrases[i] in heads:
                at, match = heads[phrases[i]] - base, ORDERS[i]
                while at > 0 and len(found) < MOST_OCCURRENCES:  # below lie texts that are gone
                    found.append(at)
                    at -= backs[at] or at
                break
        for before in reversed(suffix[-LONGEST_MATCH:-match]):
            longer = [at for at in found if log[at - match - 1] == before]
            if not longer:
                break
            found, match = longer, match + 1
        return found, match

    def follow(self, found: list[int], match: int, most: int, loops: bool = False) -> Continuation | None:
        """Walk on from the indices `found`, each step with the token that most of those still agreeing have. With `loops`, what reaches the end
        of the newest text goes on with what it proposed: a text that repeats itself will do so again."""
        log, tokens, agreement = self._log, [], []
        while len(found) > 1 and len(tokens) < most:
            nexts = [token for at in found if (token := log[at]) != BORDER]
            if not nexts:
                break
            token = nexts[0]
            votes = nexts.count(token)
            if votes < len(nexts):
                token = max(dict.fromkeys(nexts), key=nexts.count)  # the first of equals: the most recent
                votes = nexts.count(token)
            tokens.append(token)
            agreement.append(votes / len(nexts))
            found = [at + 1 for at in found if log[at] == token]
        if len(found) == 1:  # the usual case, and the rest needs no votes
            rest = log[found[0] : found[0] + most - len(tokens)].tolist()
            tokens += rest[: rest.index(BORDER)] if BORDER in rest else rest
            if loops and found[0] + len(rest) >= len(log) - 1 and tokens:
                tokens = (tokens * (most // len(tokens) + 1))[:most]
            agreement += [1.0] * (len(tokens) - len(agreement))
        return Continuation(tokens, match, agreement) if tokens else None


def _phrases(tokens: Sequence[int], start: int, at: int) -> tuple[int, ...]:
    """The phrases before `at` in the order of `ORDERS`, each packed into one int, as far as they lie behind `start`."""
    before = at - start
    if before < 2:
        return (tokens[at - 1],) if before else ()
    two = tokens[at - 2] | tokens[at - 1] << 32
    if before < 4:
        return tokens[at - 1], two
    return tokens[at - 1], two, tokens[at - 4] | tokens[at - 3] << 32 | two << 64


def _checked(max_bytes: int) -> int:
    if max_bytes < 1:
        raise ValueError(f"`max_bytes` is {max_bytes!r}; give a whole number ≥ 1.")
    return max_bytes
