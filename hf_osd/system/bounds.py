"""`option` makes a dataclass field with a help and a bound, from which its check, its flag and its line in the docs are made."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bound:
    """Defines which values an option accepts.

    Args:
        remedy (`str`): what an error asks for: `"give a whole number ≥ 1"`.
        holds (`Callable`): tells whether a value, as `read` returns it, is accepted.
        read (`Callable`, *optional*): converts what flags, YAML and users write into the value; returns anything else unchanged.
    """

    remedy: str
    holds: Callable[[Any], bool]
    read: Callable[[Any], Any] = lambda value: value

    def or_none(self) -> Bound:
        """Return a bound that accepts `None` too."""
        return Bound(f"{self.remedy}, or None", lambda value: value is None or self.holds(value), self.read)


class Help(str):
    """Describes what an option does and, in brackets, the values it accepts. `bound` is its [`Bound`].

    transformers' argument parser hands all of a field's metadata to argparse, which knows `help` but no bound: so the help carries it.
    """

    bound: Bound

    def __new__(cls, text: str, bound: Bound) -> Help:
        made = super().__new__(cls, f"{text} [{bound.remedy.partition(' ')[2]}]")
        made.bound = bound
        return made


def option(default: Any, bound: Bound, text: str) -> Any:
    """Make a field with this default, whose `metadata["help"]` is a [`Help`]."""
    return dataclasses.field(default=default, metadata={"help": Help(text, bound)})


def check_options(config: Any):
    """Convert and check all options of a dataclass instance, in place.

    Raises:
        ValueError: for a value out of bounds, naming the field, the value and the remedy.
    """
    for field in dataclasses.fields(config):
        bound = field.metadata["help"].bound
        setattr(config, field.name, checked(field.name, bound.read(getattr(config, field.name)), bound))


def checked(name: str, value: Any, bound: Bound) -> Any:
    """Return an argument's value if the bound accepts it.

    Raises:
        ValueError: if not, naming the argument, the value and the remedy.
    """
    if not bound.holds(value):
        raise ValueError(f"`{name}` is {value!r}; {bound.remedy}.")
    return value


def is_number(value: Any) -> bool:
    """Tell whether it is an int or a float; a bool is neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def whole(minimum: int) -> Bound:
    """Accept whole numbers from `minimum` on."""
    return Bound(
        f"give a whole number ≥ {minimum}",
        lambda value: is_number(value) and isinstance(value, int) and value >= minimum,
    )


def number(minimum: float) -> Bound:
    """Accept numbers from `minimum` on, infinity included."""
    return Bound(f"give a number ≥ {minimum}", lambda value: is_number(value) and value >= minimum)


def above_zero(remedy: str = "give a number above 0", maximum: float = math.inf) -> Bound:
    """Accept numbers above 0, up to `maximum`."""
    return Bound(remedy, lambda value: is_number(value) and 0 < value <= maximum)


def choice(*values: str, true: str | None = None, false: str | None = None) -> Bound:
    """Accept one of these words; `true` and `false` are the words that YAML's and users' True and False stand for."""
    meant = {"true": true, "false": false}
    return Bound(
        f"choose one of {', '.join(map(repr, values))}",
        lambda value: value in values,
        lambda value: meant.get(str(value).lower()) or value,
    )


def switch() -> Bound:
    """Accept True or False, as words too."""
    return Bound(
        "choose one of True, False",
        lambda value: isinstance(value, bool),
        lambda value: {"true": True, "false": False}.get(str(value).lower(), value),
    )


def as_number(value: Any) -> Any:
    """Convert text to a number where it is one: a flag has one type, and the option accepts words too."""
    with contextlib.suppress(ValueError, TypeError):
        return value if isinstance(value, bool) else float(value)
    return value
