"""Suffix caches draft without a model: they index recent verified texts, so that the tokens that followed a phrase before can be proposed again, after
SuffixDecoding (https://arxiv.org/abs/2411.04975). Tokens are ids from 0 to 2³¹ - 1.
"""

from __future__ import annotations

import sys
import threading
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from hf_osd.system.forks import on_fork

ORDERS = (1, 2, 4)  # lengths of the indexed phrases; a lookup begins with the longest
MAX_OCCURRENCES = 16  # of one phrase, the most recent, that vote in a lookup
MAX_MATCH = 32  # tokens; longer matches are not told apart
BORDER = -1  # put around every text; it equals no token, so that no comparison runs into another text

# `nbytes` is estimated by CPython's sizes. A token: an entry in the log and in three chains, 4 bytes each and a sixteenth
# more that arrays allocate ahead. A phrase: up to 48 bytes of key, up to 32 of position, and its entry in the dict, which
# is 30 to 120 bytes as the dict grows and at most 140 after texts were dropped. A cache: empty dicts, arrays and the lock.
TOKEN_BYTES = 18
PHRASE_BYTES = 160
CACHE_BYTES = 2048
MAX_ENTRY_BYTES = 140


@dataclass(frozen=True)
class Continuation:
    """Holds a proposal: the tokens that followed the longest match of a text's end.

    Args:
        tokens (`list[int]`): the proposed tokens, at least one.
        match (`int`): how many of the text's last tokens matched, at most 32.
        agreement (`list[float]`): for each token the share, in (0, 1], of occurrences that had it, among those that agreed
            with all tokens before it and were longer.
    """

    tokens: list[int]
    match: int
    agreement: list[float]


class SuffixCache:
    """Holds one tenant's recent texts, bounded by bytes; the oldest texts are dropped first. Threads may share it.

    Args:
        max_bytes (`int`): bound on `nbytes`. Of a text longer than `(max_bytes - 2048) // 498` tokens only the end is kept: that
            length fits whatever its phrases are.
        on_change (`Callable`, *optional*): called with the cache after each `add`, with its lock released.

    Raises:
        ValueError: if `max_bytes` is below 1.
    """

    def __init__(self, max_bytes: int, on_change: Callable[[SuffixCache], None] | None = None):
        self.max_bytes, self._on_change = _checked(max_bytes), on_change
        self._longest = (max_bytes - CACHE_BYTES) // (TOKEN_BYTES + len(ORDERS) * PHRASE_BYTES)
        self._index = _Index()
        self._lengths: deque[int] = deque()  # of the texts, the oldest first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Counts the tokens held."""
        with self._lock:
            return sum(self._lengths)

    @property
    def nbytes(self) -> int:
        """Estimates the bytes: 18 per token, 160 per distinct phrase of 1, 2 or 4 tokens, and 2048 once; 0 if nothing is held."""
        with self._lock:
            return self._nbytes()

    def add(self, tokens: Sequence[int]):
        """Adds the text of one finished request, prompt and answer."""
        kept = array("i", tokens[-self._longest :])  # an invalid token raises here, before anything has changed
        if self._longest >= 1 and len(kept):
            with self._lock:
                self._index.begin()
                self._index.extend(kept)
                self._lengths.append(len(kept))
                while self._nbytes() > self.max_bytes:
                    self._index.drop_oldest(self._lengths.popleft())
                self._index.shrink_dicts()
        if self._on_change is not None:
            self._on_change(self)

    def continuation(self, suffix: Sequence[int], max_tokens: int) -> Continuation | None:
        """Proposes up to `max_tokens` tokens that followed the longest match of the end of `suffix`; `None` if nothing matched."""
        return self._longer(list(suffix[-MAX_MATCH:]), max_tokens, 0)

    def _longer(self, suffix: list[int], max_tokens: int, match: int) -> Continuation | None:
        """Proposes a continuation if its match is longer than `match`."""
        with self._lock:
            found, longest = self._index.find(suffix)
            return self._index.walk(found, longest, max_tokens) if longest > match else None

    def _nbytes(self) -> int:
        return CACHE_BYTES + self._index.nbytes if self._lengths else 0


class CallSuffixes:
    """Indexes the text of one running call, and looks up its end in it and in the tenant's cache. Only one thread at a time may
    use it.

    Args:
        tokens (`Sequence[int]`): the prompt.
        cache (`SuffixCache`, *optional*): earlier texts. It is only read: the caller adds the text when the call is over.
    """

    def __init__(self, tokens: Sequence[int], cache: SuffixCache | None = None):
        self._index, self._cache = _Index(), cache
        self._index.begin()
        self._index.extend(tokens)

    @property
    def tokens(self) -> list[int]:
        """Lists the prompt and all verified tokens since."""
        return self._index.last(sys.maxsize)

    def extend(self, tokens: Sequence[int]):
        """Appends verified tokens."""
        self._index.extend(tokens)

    def continuation(self, max_tokens: int, drafted: Sequence[int] = ()) -> Continuation | None:
        """Proposes the tokens that followed the longest match of the text's end, in this text or in the cache; of equal matches this text's.

        Args:
            max_tokens (`int`): the largest number of tokens to propose.
            drafted (`Sequence[int]`): drafted tokens, matched as though the text went on with them; they are not stored.

        Returns:
            `Continuation`: `None` if nothing matched.
        """
        index = self._index
        # The proposal is accepted only if the drafted tokens are, and then they are text like the rest.
        index.extend(drafted)
        try:
            suffix = index.last(MAX_MATCH)
            found, match = index.find(suffix)
            if self._cache is not None and match < MAX_MATCH:
                cached = self._cache._longer(suffix, max_tokens, match)
                if cached is not None:
                    return cached
            return index.walk(found, match, max_tokens, loops=True)
        finally:
            index.shorten(len(drafted))


class SuffixCaches:
    """Holds a [`SuffixCache`] for each tenant, under one bound. Threads may share it.

    Args:
        max_bytes (`int`): bound on the bytes of all tenants together. Beyond it the least recently used tenants, by
            `for_tenant` or `add`, lose all their texts.

    Raises:
        ValueError: if `max_bytes` is below 1.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = _checked(max_bytes)
        self._nbytes = 0
        # A cache lives while it holds texts or a caller refers to it: the caller's cache stays the tenant's after it has lost its
        # texts, and tenants that never add anything take no memory.
        self._by_tenant: WeakValueDictionary[Hashable, SuffixCache] = WeakValueDictionary()
        self._filled: OrderedDict[SuffixCache, int] = OrderedDict()  # bytes of each, the least recently used first
        self._lock = threading.Lock()
        on_fork(self)

    @property
    def nbytes(self) -> int:
        """Returns the estimated bytes of all tenants."""
        return self._nbytes

    def for_tenant(self, tenant: Hashable) -> SuffixCache:
        """Returns the cache of this tenant; `None` is the tenant of calls that name none."""
        with self._lock:
            cache = self._by_tenant.get(tenant)
            if cache is None:
                cache = self._by_tenant[tenant] = SuffixCache(self.max_bytes, self._resize)
            elif cache in self._filled:
                self._filled.move_to_end(cache)
            return cache

    def after_fork(self):
        """Empties, in a forked child, the caches that another thread was changing."""
        self._lock = threading.Lock()
        for cache in list(self._by_tenant.values()):
            if cache._lock.locked():
                cache._index, cache._lengths, cache._lock = _Index(), deque(), threading.Lock()

    def _resize(self, cache: SuffixCache):
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
        with cache._lock:
            cache._index, cache._lengths = _Index(), deque()


class _Index:
    """Stores texts in one log with a border around each, and for every phrase the places where it was followed. It has no lock.

    A place is where a phrase's continuation begins, so the end of a text, which nothing follows yet, is never found. Places
    count from the first text ever held: `place - base` is the index in the log. For each order a dict maps a phrase to its most
    recent place, and an array parallel to the log holds the distance from each place to the one before, 0 if there was none. So
    extending, shortening and dropping the oldest take the same time however often a phrase occurs.
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
        """Begins a text."""
        self._start = len(self._log)
        self._log.append(BORDER)
        for _, backs in self._orders:
            backs.append(0)

    def extend(self, tokens: Sequence[int]):
        """Appends to the newest text."""
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
        """Undoes `extend` for the last `count` tokens of the newest text."""
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
        """Drops the oldest text, of `length` tokens."""
        for at in range(1, length + 1):
            for (heads, _), phrase in zip(self._orders, _phrases(self._log, 1, at), strict=False):
                if heads[phrase] == at + self._base:
                    del heads[phrase]
        for column in (self._log, *(backs for _, backs in self._orders)):
            del column[: length + 1]
        self._base += length + 1

    def shrink_dicts(self):
        """Rebuilds dicts that are too large for their entries: Python never shrinks one by itself."""
        for i, (heads, backs) in enumerate(self._orders):
            if sys.getsizeof(heads) > MAX_ENTRY_BYTES * len(heads):
                self._orders[i] = dict(heads), backs

    def last(self, count: int) -> list[int]:
        """Returns the newest text's last tokens, at most `count`."""
        end = len(self._log) - 1
        return self._log[max(self._start, end - count) : end].tolist()

    def find(self, suffix: list[int]) -> tuple[list[int], int]:
        """Finds the indices after the longest match of the suffix's end, the most recent first, and the match's length; `[], 0`
        if nothing matches."""
        log, base, found, match = self._log, self._base, [], 0
        phrases = _phrases(suffix, 0, len(suffix))
        for i in reversed(range(len(phrases))):
            heads, backs = self._orders[i]
            if phrases[i] in heads:
                at, match = heads[phrases[i]] - base, ORDERS[i]
                while at > 0 and len(found) < MAX_OCCURRENCES:  # below 0 are dropped texts
                    found.append(at)
                    at -= backs[at] or at
                break
        for before in reversed(suffix[-MAX_MATCH:-match]):
            longer = [at for at in found if log[at - match - 1] == before]
            if not longer:
                break
            found, match = longer, match + 1
        return found, match

    def walk(self, found: list[int], match: int, max_tokens: int, loops: bool = False) -> Continuation | None:
        """Builds a continuation from the indices `found`: at each step it takes the token that most of them have, and drops the others. With `loops`,
        a proposal that reaches the end of the newest text repeats itself: the text is in a loop."""
        log, tokens, agreement = self._log, [], []
        while len(found) > 1 and len(tokens) < max_tokens:
            nexts = [token for at in found if (token := log[at]) != BORDER]
            if not nexts:
                break
            token = nexts[0]
            votes = nexts.count(token)
            if votes < len(nexts):
                token = max(dict.fromkeys(nexts), key=nexts.count)  # of equals the first: the most recent
                votes = nexts.count(token)
            tokens.append(token)
            agreement.append(votes / len(nexts))
            found = [at + 1 for at in found if log[at] == token]
        if len(found) == 1:  # the usual case, and the rest needs no votes
            rest = log[found[0] : found[0] + max_tokens - len(tokens)].tolist()
            tokens += rest[: rest.index(BORDER)] if BORDER in rest else rest
            if loops and found[0] + len(rest) >= len(log) - 1 and tokens:
                tokens = (tokens * (max_tokens // len(tokens) + 1))[:max_tokens]
            agreement += [1.0] * (len(tokens) - len(agreement))
        return Continuation(tokens, match, agreement) if tokens else None


def _phrases(tokens: Sequence[int], start: int, at: int) -> tuple[int, ...]:
    """Returns the phrases that end before `at` and begin at `start` or later, in the order of `ORDERS`, each packed into one int."""
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
