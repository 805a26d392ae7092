"""Figures and how they are shown: means that know of missing values, and cells and lines of tables. It knows nothing of runs or models."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from itertools import pairwise

RESAMPLES = 1000
LONGEST_NAME = 40  # letters of a name in a picture or a table


def mean(values: Sequence[float | None]) -> float | None:
    """Average the values that are known; `None` if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def or_none(value: float) -> float | None:
    """Replace NaN, which JSON cannot hold, by `None`."""
    return None if math.isnan(value) else value


def ratio(one: float, other: float) -> float | None:
    """Divide `one` by `other`; `None` if `other` is 0."""
    return one / other if other else None


def rate_ratio(pairs: Sequence[tuple[float, float, float, float]], beside: float = 0.0) -> float | None:
    """Divide the tokens a second of one way to decode by those of another, on the same requests; `None` without tokens or seconds.

    Args:
        pairs: for each request the tokens and the seconds of the one, and the tokens and the seconds of the other.
        beside: further seconds of the one, for each request.
    """
    tokens, seconds, other_tokens, other_seconds = (sum(pair[i] for pair in pairs) for i in range(4))
    seconds += beside * len(pairs)
    return tokens / seconds / (other_tokens / other_seconds) if seconds and other_tokens and other_seconds else None


def rate_interval(pairs: Sequence[tuple[float, float, float, float]], beside: float = 0.0) -> list[float] | None:
    """Compute the 95% interval of [`rate_ratio`], a bootstrap over requests: its ends; `None` with fewer than two requests."""
    if len(pairs) < 2:
        return None
    draws = random.Random(0)
    drawn = (rate_ratio(draws.choices(pairs, k=len(pairs)), beside) for _ in range(RESAMPLES))
    ratios = sorted(ratio for ratio in drawn if ratio is not None)
    if not ratios:
        return None
    return [ratios[round(share * (len(ratios) - 1))] for share in (0.025, 0.975)]


def fifths(rows: Sequence) -> list[Sequence]:
    """Split rows into five parts in order: the first and the last have a fifth of them, rounded down, and at least one; the others share the rest."""
    size = max(len(rows) // 5, 1)
    middle = rows[size : max(len(rows) - size, size)]
    cuts = [k * len(middle) // 3 for k in range(4)]
    return [rows[:size], *(middle[begin:end] for begin, end in pairwise(cuts)), rows[-size:]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Summarise repeats as `median`, `min` and `max`."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cell(value: float | dict | list | None, form: str | None = None) -> str:
    """Format a figure for a table: a dash if it is not known, a [`spread`] as its median and, in brackets, its ends; several figures one after
    another.

    Args:
        form (`str`, *optional*): a format such as `"{:.1f}"`; by default whole numbers as they are and others with three places.
    """
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(cell(one, form) for one in value)
    if isinstance(value, dict):
        return f"{cell(value['median'], form)} ({cell(value['min'], form)}-{cell(value['max'], form)})"
    return (form or ("{}" if isinstance(value, int) else "{:.3f}")).format(value)


def shown(name: str) -> str:
    """Make a name that comes from data fit a line of a table or a picture: one line, printable characters only, and at most 40 of them."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    name = " ".join(name.split())
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def aligned(lines: Sequence[Sequence[str]], right: bool = False) -> str:
    """Lay out lines of cells in columns, two spaces apart; with `right`, all columns but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if right and i else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def markdown(lines: Sequence[Sequence[object]]) -> str:
    """Write lines of cells, the heads first, as a Markdown table."""
    heads, *rows = lines
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (heads, ["---"] * len(heads), *rows))
