"""Provides what the metrics share: `Layout`, the columns of one configuration; `CheckedRows`, which checks added rows; and intervals by request."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from evaluate import MetricInfo
    from torch import Tensor

# Columns and options of all layouts of all metrics: `evaluate.combine(...).compute` passes each metric the others' as well.
FAMILY = {"predictions", "references", "overlaps", "outcomes", "accepted", "tested", "new_tokens", "rounds", "drafted"}
FAMILY |= {"draft_steps", "plain_seconds", "decode_seconds", "learn_seconds", "level", "c", "v"}

_CITATION = """\
@article{liu2023online,
  title={Online Speculative Decoding},
  author={Liu, Xiaoxuan and Hu, Lanxiang and Bailis, Peter and Cheung, Alvin and Deng, Zhijie and Stoica, Ion and Zhang, Hao},
  journal={arXiv preprint arXiv:2310.07177},
  year={2023}
}
@article{leviathan2022fast,
  title={Fast Inference from Transformers via Speculative Decoding},
  author={Leviathan, Yaniv and Kalman, Matan and Matias, Yossi},
  journal={arXiv preprint arXiv:2211.17192},
  year={2022}
}
"""


@dataclass(frozen=True)
class Layout:
    """Describes one configuration of a metric.

    Args:
        columns (`dict`): features by column, for `datasets.Features`.
        read (`Callable`): takes a row's values in the order of the columns, and returns them as plain Python values; raises `ValueError` for values that
            are not allowed.
        figures (`Callable`): takes the columns in order, each a list with one item a row, and options by keyword; returns figures by name.
        options (`tuple[str, ...]`): names of the options of `figures`.
    """

    columns: dict[str, Any]
    read: Callable[..., tuple]
    figures: Callable[..., dict]
    options: tuple[str, ...] = ("level",)


class CheckedRows:
    """Checks each row when it is added, so that an error has the caller's row number, and rows added before stay. Inherit from it before `evaluate.Metric`.
    `evaluate` copies the three methods and appends to their docstrings, so each must have one."""

    DESCRIPTION: ClassVar[str]
    INPUTS: ClassVar[str]
    LAYOUTS: ClassVar[dict[str, Layout]]

    def _info(self) -> MetricInfo:
        import datasets
        import evaluate

        return evaluate.MetricInfo(
            description=self.DESCRIPTION,
            citation=_CITATION,
            inputs_description=self.INPUTS,
            features=datasets.Features(self.layout.columns),
            reference_urls=["https://arxiv.org/abs/2310.07177", "https://arxiv.org/abs/2211.17192"],
        )

    @property
    def layout(self) -> Layout:
        """Return the layout of this configuration; `ValueError` if there is none of its name."""
        if self.config_name not in self.LAYOUTS:
            known = ", ".join(map(repr, self.LAYOUTS))
            raise ValueError(f"There is no configuration {self.config_name!r}; choose one of {known}.")
        return self.LAYOUTS[self.config_name]

    def compute(self, *, predictions=None, references=None, **kwargs) -> dict | None:
        """Add the given rows, and compute the figures of all rows added; returns `None` in a process other than the first."""
        given = {"predictions": predictions, "references": references, **kwargs}
        given = {name: value for name, value in given.items() if value is not None}
        if unknown := sorted(given.keys() - FAMILY):
            raise ValueError(f"{', '.join(unknown)}: unknown; {self._takes()}.")
        if not len(self) and not given.keys() & self.layout.columns.keys():
            others = [name for name, other in self.LAYOUTS.items() if given.keys() & other.columns.keys()]
            hint = f"{', '.join(sorted(given))} would fit another: load {' or '.join(map(repr, others))}"
            raise ValueError(
                f"There are no rows: {self._takes()}; {hint if others else 'give them, or add them first'}."
            )
        return super().compute(predictions=predictions, references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Add one row."""
        row = {"predictions": prediction, "references": reference, **kwargs}
        self.add_batch(**{name: [value] for name, value in row.items() if name in kwargs or value is not None})

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Add rows, column by column."""
        given = {"predictions": predictions, "references": references, **kwargs}
        columns = {name: given.get(name) for name in self.layout.columns}
        if lacking := [name for name, column in columns.items() if column is None]:
            raise ValueError(f"{', '.join(lacking)}: missing; {self._takes()}.")
        columns = {name: items(name, column) for name, column in columns.items()}
        same_length(**columns)
        rows = []
        for i, row in enumerate(zip(*columns.values(), strict=True)):
            try:
                rows.append(self.layout.read(*row))
            except ValueError as error:
                raise ValueError(f"Row {i}: {error}") from None
        read = zip(*rows, strict=True) if rows else [()] * len(columns)
        # evaluate refuses the others by name.
        others = {name: value for name, value in kwargs.items() if name not in columns}
        super().add_batch(**dict(zip(columns, map(list, read), strict=True)), **others)

    def _compute(self, **given) -> dict:
        columns = [given[name] for name in self.layout.columns]
        options = {name: given[name] for name in self.layout.options if name in given}
        return self.layout.figures(*columns, **options)

    def _takes(self) -> str:
        return (
            f"the configuration {self.config_name!r} takes {', '.join((*self.layout.columns, *self.layout.options))}"
        )


def items(name: str, values) -> list:
    """Return the items of a list, an array or a tensor as plain Python values."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"`{name}` is {values!r}; give a list.")
    return list(values)


def whole(name: str, value) -> int:
    """Read a count or a token id; `ValueError` unless it is a whole number ≥ 0."""
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"`{name}` is {value!r}; give a whole number ≥ 0.")
    return number


def wholes(name: str, values) -> list[int]:
    """Read a list of them, such as one for each round."""
    return [whole(f"{name}[{i}]", value) for i, value in enumerate(items(name, values))]


def real(name: str, value, wanted: str, allowed: Callable[[float], bool]) -> float:
    """Read a finite number; `ValueError`, which asks for what is `wanted`, unless `allowed` holds."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or not allowed(number):
        raise ValueError(f"`{name}` is {value!r}; give {wanted}.")
    return number


def same_length(**lists: list):
    """Raise `ValueError` unless the columns, or a row's lists, have the same length."""
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"`{name}` has {n}" for name, n in lengths.items())
        raise ValueError(f"{counts}; give lists of the same length.")


def share_interval(name: str, scores: Sequence[Tensor], level: float | None) -> dict[str, float]:
    """Compute the interval of a mean of numbers from 0 to 1, `(N,)` a request, by bootstrap over requests; 0 to 1 with fewer than two of them. Returns
    `<name>_low` and `<name>_high`, or `{}` with `level=None`."""
    from hf_osd.metrics.intervals import interval

    return {} if level is None else _ends(name, *interval(scores, level)[1:])


def length_interval(name: str, lengths: Sequence[Tensor], level: float | None) -> dict[str, float]:
    """Compute the interval of a mean of lengths, which have no upper bound: 0 to infinity with fewer than two requests. Returns as `share_interval` does."""
    from hf_osd.metrics.intervals import compare

    if level is None:
        return {}
    gain = compare([0 * one for one in lengths], lengths, level)  # the gain over 0 is the length itself
    return _ends(name, max(gain.low, 0.0), gain.high)


def _ends(name: str, low: float, high: float) -> dict[str, float]:
    return {f"{name}_low": low, f"{name}_high": high}
