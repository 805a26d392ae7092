"""`DraftPool` keeps what several drafts of one base differ in, in bounded memory: those that were not used for longest are put away to disk, or dropped."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hf_osd.system.files import staged
from hf_osd.system.strict_json import dumps, loads

if TYPE_CHECKING:
    import os

    from torch import Tensor

    from hf_osd.models.hot_swap import HotSwapDraft

logger = logging.getLogger(__name__)

# The route of calls for which nobody named one; it is always there, and no member of a pool.
DEFAULT = "default"

# Bytes that learning holds between updates for each weight that learns, in float32: it, its average over steps and two moments of AdamW, which the candidate shares.
_LEARNING_BYTES = 4 * 4

# Before the names of a learner's tensors in a route's file; beside them stand the draft's weights.
_LEARNERS = "learner:"


class Member(Protocol):
    """A draft of the pool, with whatever serves and teaches it: a learner, see [`hf_osd.learning.protocol`], or `None`."""

    serving: HotSwapDraft
    learner: Any


M = TypeVar("M", bound=Member)


def route_bytes(member: Member) -> int:
    """Estimate the bytes that a draft adds to the base: the weights that serve and are its own, and those that learning holds."""
    serving = member.serving
    own = serving.own_bytes()
    if member.learner is None or not serving.version:
        return own
    weights = [tensor for _, tensor in serving.weights()]
    # The accepted draft is held as it serves, and in 16 bits the candidate too; of an adapter that is what serves already.
    held = 0 if serving.adapter is not None else 4
    return own + sum((_LEARNING_BYTES + held) * tensor.numel() for tensor in weights)


class DraftPool:
    """Holds the drafts of routes by name. Not thread-safe: its owner holds a lock.

    Args:
        make (`Callable`): makes a member of a name and learnt weights, by their names, or `None`.
        most (`int`): members in memory, at most.
        max_bytes (`int`, *optional*): of what they add to the base, by `route_bytes`; the one used last always stays. Where they do not fit, adapters first serve unmerged, those that
            were not used for longest before others.
        folder (*optional*): where learnt weights are put away.
        resumed (`Callable`): called with name, member and the tensors and values of its learner's `state()`, when it comes back from the folder. Returns `False` if it cannot go on
            from there: it then begins from its weights alone.
        closing (`Callable`): called with name, member and whether its weights were kept, before it goes.
        busy (`Callable`): tells whether a member serves a call: it then stays, and the pool is larger for that long.
        base (`str`): tells the draft that all have learnt over from others.

    Raises:
        ValueError: if `max_bytes` is below 1, or the folder holds weights that were learnt over another draft.
    """

    def __init__(
        self,
        make: Callable[[str, dict[str, Tensor] | None], M],
        most: int,
        max_bytes: int | None = None,
        folder: str | os.PathLike | None = None,
        closing: Callable[[str, M, bool], None] = lambda name, member, kept: None,
        busy: Callable[[M], bool] = lambda member: False,
        base: str = "",
        resumed: Callable[[str, M, dict[str, Tensor], dict], bool] = lambda name, member, tensors, values: False,
    ):
        if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1):
            raise ValueError(
                f"`pool_bytes` is {max_bytes!r}; give the bytes that routes may take beside the draft as it came, or None for no bound."
            )
        self._make, self._most, self.max_bytes, self._closing = make, most, max_bytes, closing
        self.folder = None if folder is None else Path(folder)
        self._busy, self._base, self._resumed = busy, base, resumed
        self._members: OrderedDict[str, M] = OrderedDict()  # the one used last at the end
        self._check_folder()
        self._warned = False

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def items(self) -> Iterator[tuple[str, M]]:
        return iter(self._members.items())

    def peek(self, name: str) -> M:
        """Return a member that is in memory; that is no use of it."""
        return self._members[name]

    @property
    def nbytes(self) -> int:
        """Estimate the bytes that all members in memory add to the base."""
        return sum(map(route_bytes, self._members.values()))

    def get(self, name: str) -> M:
        """Return a member, from memory or from where it was put away, or a new one."""
        if name not in self._members:
            self._make_room()
            self._members[name] = self._back(name)
        self._members.move_to_end(name)
        self._fit()
        return self._members[name]

    def add(self, name: str, weights: dict[str, Tensor]) -> M:
        """Make a member of learnt weights, by their names."""
        self._members.pop(name, None)
        self._make_room()
        self._members[name] = self._make(name, weights)
        return self._members[name]

    def drop(self, name: str):
        """Let a member go that will not be asked for again, if it is in memory."""
        if name in self._members:
            self._closing(name, self._members[name], True)
            del self._members[name]

    def _fit(self):
        """Let adapters serve unmerged, and then members go, until the others fit; the one used last stays."""
        if self.max_bytes is None:
            return
        for member in self._members.values():
            if self.nbytes <= self.max_bytes:
                return
            member.serving.rest()
        while len(self._members) > 1 and self.nbytes > self.max_bytes and self._put_away(keep=1):
            pass

    def _make_room(self):
        while len(self._members) >= self._most and self._put_away():
            pass

    def _put_away(self, keep: int = 0) -> bool:
        """Let the member go that was not used for longest, but for the last `keep` ones. Returns `False` if all that may go serve calls."""
        names = list(self._members)[: len(self._members) - keep]
        name = next((one for one in names if not self._busy(self._members[one])), None)
        if name is None:
            return False
        member = self._members[name]
        kept = self.folder is not None
        if kept:
            learner = _learners_state(member)
            if member.serving.version or learner is not None:
                with staged(self.folder) as staging:
                    write_weights(member, staging / file_name(name), self._base, learner)
        elif not self._warned:
            self._warned = True
            logger.warning(
                "Route %r is dropped with what it has learnt, and others will be, for the pool is full. Raise max_routes or pool_bytes, or give a pool_folder, into which "
                "learnt weights are put away.",
                name,
            )
        self._closing(name, member, kept)
        del self._members[name]
        return True

    def _check_folder(self):
        from safetensors import safe_open

        for path in sorted(self.folder.glob("*.safetensors")) if self.folder is not None else ():
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("base", "")
            if found != self._base:
                raise ValueError(
                    f"{path} holds weights that were learnt over another draft; give another `pool_folder`, or the draft that it was made with."
                )

    def path(self, name: str) -> Path:
        """Return the file of a route that was put away."""
        return self.folder / file_name(name)

    def has_put_away(self, name: str) -> bool:
        """Tell whether a route's weights lie in the folder."""
        return self.folder is not None and self.path(name).is_file()

    def _back(self, name: str) -> M:
        """Make a member as it was when it was put away, or a new one."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        if not self.has_put_away(name):
            return self._make(name, None)
        with safe_open(self.path(name), framework="pt") as file:
            values = (file.metadata() or {}).get("learner")
        tensors = load_file(self.path(name))
        weights = {key: tensor for key, tensor in tensors.items() if not key.startswith(_LEARNERS)}
        if values is None:
            return self._make(name, weights)
        learner = {key.removeprefix(_LEARNERS): tensors[key] for key in tensors.keys() - weights.keys()}
        member = self._make(name, None)
        return member if self._resumed(name, member, learner, loads(values)) else self._make(name, weights)


def write_weights(member: Member, path: Path, base: str, learner: tuple[dict[str, Tensor], dict] | None = None):
    """Write what a member has learnt to a safetensors file, which names the draft, `base`, that it was learnt over; and the state of its learner, if given."""
    from safetensors.torch import save_file

    tensors, values = learner or ({}, None)
    weights = dict(member.serving.weights()) | {f"{_LEARNERS}{name}": tensor for name, tensor in tensors.items()}
    metadata = {"base": base} | ({} if values is None else {"learner": dumps(values, exact=True)})
    save_file({name: weight.detach().contiguous().cpu() for name, weight in weights.items()}, path, metadata=metadata)


def _learners_state(member: Member) -> tuple[dict[str, Tensor], dict] | None:
    """Copy what a member's learner needs to go on, if it has learnt; there is no state to be had of one that a fork has left behind."""
    if member.learner is None or not member.learner.metrics()["updates"]:
        return None
    with contextlib.suppress(RuntimeError):
        return member.learner.state()
    return None


def file_name(name: str) -> str:
    """Name the file of a route: its letters as far as they are safe, and a digest that tells names apart which are the same in these."""
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40]
    return f"{safe or 'route'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"
