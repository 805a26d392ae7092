"""The console side of a recipe: flags and config file to dataclasses, errors to one line and an exit status."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from signals import ended_by_signals, exit_status

from hf_osd import OnlineConfig

logger = logging.getLogger("hf_osd.recipes")


@ended_by_signals()
def run_command(
    arguments: type,
    run: Callable[..., int | None],
    argv: list[str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> int:
    """Call `run(args, config)` with what the flags, or the file named by `--config`, say.

    Args:
        arguments: the recipe's own dataclass; every field of `OnlineConfig` is a flag too.
        run: the recipe; its exit status, `None` being 0.
        argv: the flags, `sys.argv` if left out.
        defaults: what the recipe has in place of `OnlineConfig`'s own defaults; flags and config file win over it.

    Returns:
        `int`: the exit status; 2 for what a user can mend, which is logged, and 130, 143 or 129 for Ctrl-C, SIGTERM or SIGHUP.
    """
    from transformers.utils.logging import disable_progress_bar
    from trl import TrlParser

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_osd").setLevel(logging.INFO)
    disable_progress_bar()  # of loading weights
    try:
        parser = TrlParser((arguments, OnlineConfig))
        parser.set_defaults_with_config(**(defaults or {}))
        args, config = parser.parse_args_and_config(argv)
        return run(args, config) or 0
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt as interrupt:
        return exit_status(interrupt)


def check_numbers(args: Any, least: dict[str, int]):
    """The fields that `least` names are given and not below it, or left out where they may be.

    Raises:
        ValueError: if one is below.
    """
    for name, lowest in least.items():
        value = getattr(args, name)
        if value is not None and value < lowest:
            raise ValueError(f"`{name}` is {value}; give a whole number ≥ {lowest}.")


def check_temperature(args: Any, name: str):
    """The field is a temperature to sample at, or 0 for not at all.

    Raises:
        ValueError: if it is neither.
    """
    if not 0 <= (value := getattr(args, name)) < math.inf:
        raise ValueError(f"`{name}` is {value}; give a temperature above 0, such as 0.7, or leave it out.")
