"""The console side of a recipe: turns flags and config file into dataclasses, and errors into one line and an exit status."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_osd import OnlineConfig
from hf_osd.config import check_removed
from hf_osd.system.output_paths import check_apart, check_writable
from recipes.common.run_folder import RUN_FILES
from recipes.common.signals import ended_by_signals, exit_status

logger = logging.getLogger("hf_osd.recipes")

# Flags that are paths, in any recipe: read, one path or several with ',' between; and written, with whether that is a folder.
_READ, _READ_SEVERAL = ("target", "draft", "before"), ("stream", "trace", "also", "drafts")
_WRITTEN = {"output_dir": True, "save_to": True, "json": False, "log": False}


@ended_by_signals()
def run_command(
    arguments: type,
    run: Callable[..., int | None],
    argv: list[str] | None = None,
    defaults: dict[str, Any] | None = None,
) -> int:
    """Parse flags and the file that `--config` names, and call `run(args, config)`.

    Args:
        arguments: the recipe's own dataclass; every field of `OnlineConfig` is a flag too.
        run: the recipe; returns its exit status, or `None` for 0.
        argv: the flags, by default those of `sys.argv`.
        defaults: replace defaults of `OnlineConfig`; flags and config file win over them.

    Returns:
        `int`: the exit status: 2 for an error that the user can fix, which is logged, and 130, 143 or 129 after Ctrl-C, SIGTERM or SIGHUP.
    """
    from transformers.utils.logging import disable_progress_bar
    from trl import TrlParser

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("hf_osd").setLevel(logging.INFO)
    disable_progress_bar()  # the bars of loading weights
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # a replaced stream may lack it
            stream.reconfigure(errors="backslashreplace")  # names come from data, and must not break a table
    try:
        parser = TrlParser((arguments, OnlineConfig))
        parser.set_defaults_with_config(**(defaults or {}))
        flags = sys.argv[1:] if argv is None else argv
        check_removed({flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--")})
        file = config_file(flags)
        args, config = parser.parse_args_and_config(argv)
        check_paths(args, file)
        return run(args, config) or 0
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 2
    except KeyboardInterrupt as interrupt:
        return exit_status(interrupt)


def check_paths(args: Any, config_file: str | None = None):
    """Check that each output can be written, is none of the inputs, and replaces figures only with `--overwrite`.

    Raises:
        ValueError, OSError: otherwise; the message names both flags, or the place.
    """
    read = [("--config", config_file or "")]
    read += [(f"--{name}", getattr(args, name, None) or "") for name in _READ]
    read += [
        (f"--{name}", part.strip()) for name in _READ_SEVERAL for part in (getattr(args, name, None) or "").split(",")
    ]
    for name, is_folder in _WRITTEN.items():
        if (path := getattr(args, name, None)) is None:
            continue
        places = [path]
        if name == "output_dir":  # inputs may lie in it, but not under a name that a run writes
            places += [file for pattern in RUN_FILES for file in Path(path).glob(pattern)]
        for place in places:
            for flag, given in read:
                check_apart({f"--{name}": place}, {flag: given}, around=place == path)
        check_writable(f"--{name}", path, is_folder)
        if name == "json" and Path(path).is_file() and not args.overwrite:
            raise ValueError(
                f"--json {path} is there already; choose another file, or pass --overwrite to replace it."
            )


def config_file(argv: list[str]) -> str | None:
    """Find the file that `--config` names and check that it is YAML, which the parser does not; returns `None` without such a flag.

    Raises:
        ValueError: if it is not YAML, no file is named, or a key was removed; the message names the line, or the key.
        OSError: if it cannot be read.
    """
    import yaml

    if "--config" not in argv:
        return None
    path = "".join(argv[argv.index("--config") + 1 :][:1])
    if not path:
        raise ValueError("`--config` is without a file; name one, such as --config recipes/configs/demo.yaml.")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"--config {path}" if mark is None else f"--config {path}, line {mark.line + 1}"
        raise ValueError(
            f"{where}: {getattr(error, 'problem', None) or error}; correct it: a line is a key, a colon and a value."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path}: {error}; save it as UTF-8.") from error
    if not isinstance(values, dict):
        raise ValueError(
            f"--config {path} has no keys; write lines of a key, a colon and a value, such as requests: 100."
        )
    check_removed(values)
    return path


def numbers_of(values: str, name: str, least: int = 1) -> list[int]:
    """Read a flag of whole numbers with ',' between, each at least `least`.

    Raises:
        ValueError: if one cannot be read, or there is none.
    """
    parts = [value.strip() for value in values.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ValueError(
            f"`{name}` is {values!r}; write whole numbers from {least} on with ',' between, such as {least},{least + 2},{least + 4}."
        )
    return [int(part) for part in parts]


def check_learns(learn: str, what: str):
    """Check that `learn` means learning within this process, which `what` needs.

    Raises:
        ValueError: if it means not to learn, or to learn in another process.
    """
    if learn not in ("inline", "background"):
        raise ValueError(f"`learn` is {learn!r} and {what} learns in this process; leave it at 'inline'.")


def check_trace(trace: str):
    """Check that folders with recorded answers are named.

    Raises:
        ValueError: if there are none.
    """
    if not trace:
        raise ValueError(
            "`trace` is empty; name a folder that `python -m recipes.experiments.record` has made, such as --trace runs/traces/sql."
        )


def check_repository(name: str, target: str):
    """Check that `name` can be a repository's on the Hub and is not the target, whose weights a push would replace.

    Raises:
        ValueError: otherwise.
    """
    from huggingface_hub.utils import validate_repo_id

    if name.lower() == target.lower():
        raise ValueError(
            f"`push_to_hub` is {name!r}, which is the target, and would be written over; name another repository."
        )

    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(
            f"`push_to_hub` is {name!r}, which is no repository's name; give one such as me/my-draft. {error}"
        ) from error
