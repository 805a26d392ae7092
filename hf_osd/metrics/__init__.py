"""Has metrics for Hugging Face's `evaluate`, each in a folder with its card: acceptance rate, accepted length and speed-up, as docs/figures.md defines them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluate import EvaluationModule

NAMES = ("acceptance_rate", "accepted_length", "speedup")


def path(name: str) -> str:
    """Return the folder of a metric, for `evaluate.load` and `evaluate.combine`; `ValueError` for a name that is not in `NAMES`."""
    if name not in NAMES:
        raise ValueError(f"There is no metric {name!r}; choose one of {', '.join(map(repr, NAMES))}.")
    return str(Path(__file__).parent / name)


def load(name: str, config_name: str | None = None, **kwargs) -> EvaluationModule:
    """Load a metric by its name with `evaluate.load`; no network is needed.

    Args:
        name (`str`): one of `NAMES`.
        config_name (`str`, *optional*): the format of the rows; each card lists its metric's configurations.
        kwargs: passed to `evaluate.load`, such as `keep_in_memory`, `num_process` or `experiment_id`.

    Raises:
        ValueError: for an unknown name or configuration.
    """
    import evaluate

    return evaluate.load(path(name), config_name, **kwargs)
