"""`option`: a dataclass field with its help and its bound, from which its check, its flag and its line in the docs come."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """Which values an option takes.

    Args:
        words (`str`): that in words, as what one is asked for: `"give a whole number ≥ 1"`.
        holds (`Callable`): whether a value, as `read` returns it, is one of them.
        read (`Callable`, *optional*): turns what flags, YAML and users write into the value, and what it does not know into itself.
    """

    words: str
    holds: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value

    def or_none(self) -> Bound:
        """The same, and `None`."""
        return Bound(f"{self.words}, or None", lambda value: value is None or self.holds(value), self.read)


class Help(str):
    """What an option does and, in brackets, the values it takes. `bound` is the bound.

    transformers' argument parser hands all of a field's metadata to argparse, which knows `help` and no bound: so it comes with the help.
    """

    bound: Bound

    def __new__(cls, text: str, bound: Bound) -> Help:
        made = super().__new__(cls, f"{text} [{bound.words.partition(' ')[2]}]")
        made.bound = bound
        return made


def option(default: Any, bound: Bound, text: str) -> Any:
    """A field with this default, whose `metadata["help"]` is a [`Help`]."""
    return dataclasses.field(default=default, metadata={"help": Help(text, bound)})


def check_options(config: Any):
    """Read and check all options of a dataclass instance, in place.

    Raises:
        ValueError: for a value out of bounds, naming the field, the value and the mend.
    """
    for field in dataclasses.fields(config):
        bound = field.metadata["help"].bound
        value = bound.read(getattr(config, field.name))
        if not bound.holds(value):
            raise ValueError(f"`{field.name}` is {value!r}; {bound.words}.")
        setattr(config, field.name, value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(least: int) -> Bound:
    """Whole numbers from `least` on."""
    return Bound(
        f"give a whole number ≥ {least}", lambda value: is_number(value) and isinstance(value, int) and value >= least
    )


def number(least: float) -> Bound:
    """Numbers from `least` on, infinity included."""
    return Bound(f"give a number ≥ {least}", lambda value: is_number(value) and value >= least)


def above_zero(words: str = "give a number above 0", most: float = math.inf) -> Bound:
    """Numbers above 0, up to `most`."""
    return Bound(words, lambda value: is_number(value) and 0 < value <= most)


def choice(*values: str, true: str | None = None, false: str | None = None) -> Bound:
    """One of these words; `true` and `false` are what those two stand for, as YAML and users write them."""
    meant = {"true": true, "false": false}
    return Bound(
        f"choose one of {', '.join(map(repr, values))}",
        lambda value: value in values,
        lambda value: meant.get(str(value).lower()) or value,
    )


def switch() -> Bound:
    """True or False, in words too."""
    return Bound(
        "choose one of True, False",
        lambda value: isinstance(value, bool),
        lambda value: {"true": True, "false": False}.get(str(value).lower(), value),
    )


def as_number(value: Any) -> Any:
    """A number of its text, for flags know one type, and it may also be a word."""
    with contextlib.suppress(ValueError, TypeError):
        return value if isinstance(value, bool) else float(value)
    return value
