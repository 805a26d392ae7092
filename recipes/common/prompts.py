"""Prompt streams: JSONL files, Hub datasets, and two built in that need no download (the standard library, word problems).
Knows nothing of tokenizers or models; a row is a dict with `prompt`, `domain`, `id`, and `group` where prompts come of a kind.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import importlib
import json
import logging
import os
import random
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_HALF = re.compile("[\ud800-\udfff]")  # of a pair of surrogates
WORDS = range(6, 81)  # how long a built-in prompt's text may be; 80 words are about 100 tokens


def load_streams(spec: str, seed: int | None = 0, count: int = 1000) -> list[tuple[str, list[dict]]]:
    """The streams that `spec` names, in its order: `[(domain, rows), …]`.

    Args:
        spec: comma-separated: `stdlib`, `word_problems`, JSONL files (see `read_stream`), or
            `hub:owner/name[/config][:split[:field]]` for a dataset on the Hub (split `train` and field `prompt` by default).
            A file whose rows name several domains is several streams.
        seed: of the built-in streams' choice and order; None is 0. Files and datasets keep their own order.
        count: rows of a stream that is not a file, at most.

    Raises:
        ValueError: if `spec` is empty, a stream is malformed or empty, or two of them have the same domain.
        OSError: if there is no such file, dataset or package.
    """
    names = [name.strip() for name in spec.split(",") if name.strip()]
    if not names:
        raise ValueError(f"`stream` is {spec!r}; name JSONL files or {', '.join(_BUILT_IN)}, separated by commas.")
    streams: dict[str, list[dict]] = {}
    for name in names:
        if name in _BUILT_IN:
            rows = _BUILT_IN[name](count, seed or 0)
        elif name.startswith("hub:"):
            rows = read_hub(name, count)
        else:
            rows = read_stream(name)
        domains: dict[str, list[dict]] = {}
        for row in rows:
            domains.setdefault(row["domain"], []).append(row)
        for domain, rows in domains.items():
            if domain in streams:
                raise ValueError(
                    f"`stream` {spec!r} has the domain {domain!r} twice, the second time from {name}; name a stream once, and give "
                    "files that share a name a field `domain` of their own."
                )
            streams[domain] = rows
    return list(streams.items())


def split_held_back(rows: list[dict], count: int, seed: int | None, name: str) -> tuple[list[dict], list[dict]]:
    """Takes `count` rows out of a stream: `(held back, rest)`, both in the stream's order.

    Rows of one `group` are alike (one text with other names and numbers; questions about one database), so a group is on one side
    only: what is scored on its rows would otherwise have been learnt by heart. At most a third of the groups, as many as `count` asks
    for, is set aside; the held-back rows are taken from them in turn, and their other rows are left out.

    Raises:
        ValueError: if the stream has too few prompts, or groups of prompts, to leave any.
    """
    groups: dict = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("group", i), []).append(i)  # a row of no group is its own
    draw = random.Random(f"{seed or 0}:{name}")
    order = list(groups)
    draw.shuffle(order)
    grouped = len(groups) < len(rows)
    aside = order[: min(max(count, 0), max(len(order) // 3, 1)) if grouped else max(count, 0)]
    for group in aside:
        draw.shuffle(groups[group])
    largest = max((len(groups[group]) for group in aside), default=0)
    turns = [groups[group][turn] for turn in range(largest) for group in aside if turn < len(groups[group])]
    held, out = set(turns[: max(count, 0)]), set(turns)
    if len(held) < count or (count > 0 and len(out) == len(rows)):
        raise ValueError(
            f"{name} has {len(rows)} prompts of {len(groups)} kinds: too few to hold {count} of them back. Lower `held_back` or give "
            "more prompts."
        )
    if siblings := len(out) - len(held):
        logger.info("%s: left out %d prompts whose group is held back.", name, siblings)
    return [rows[i] for i in sorted(held)], [row for i, row in enumerate(rows) if i not in out]


# Streams from files and from the Hub


def read_stream(path: str | os.PathLike) -> list[dict]:
    """The rows of a JSONL file, in order: an object a line, with `prompt` and, if wanted, `domain`, `id` and `group`.

    `domain` is the file's stem and `id` the line's number where a row has none. Blank lines, and prompts seen before in the file,
    are left out. The file is UTF-8, or what its byte order mark says; marks are read over, wherever files were put together.

    Raises:
        ValueError: if a line is malformed (the message names file and line), or there is no prompt at all.
        OSError: if the file cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"No prompts at {path}: give a JSONL file with a field `prompt`, {', '.join(_BUILT_IN)}, or hub:owner/name."
        )
    rows = []
    stem = path.stem.encode("utf-8", "replace").decode()  # a name that is no UTF-8 is half surrogates in Python
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}", {"domain": stem, "id": str(number)}))
    return _distinct(rows, str(path))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a text file as UTF-8, of which each may still be malformed."""
    with path.open("rb") as file:
        start = file.read(4)
        # UTF-32's mark begins with that of UTF-16.
        encoding = next((name for mark, name in _MARKS.items() if start.startswith(mark)), None)
        file.seek(0)
        if encoding is None:
            yield from (line.removeprefix(codecs.BOM_UTF8) for line in file)
            return
        try:
            text = file.read().decode(encoding)
        except ValueError as error:
            raise ValueError(f"{path}: {error}, which its byte order mark says it is; save it as UTF-8.") from error
    yield from (line.encode("utf-8", "surrogatepass") for line in text.split("\n"))


def _parse(line: bytes, where: str, defaults: dict) -> dict:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # of the encoding or of the JSON
        raise ValueError(
            f'{where}: {error}. A line is one JSON object in UTF-8, such as {{"prompt": "…"}}.'
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: {type(row).__name__} in place of an object such as {{"prompt": "…"}}.')
    row = {key: row[key] for key in ("prompt", "domain", "id", "group") if row.get(key) is not None}
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        what = "lacking" if row.get("prompt") is None else "empty or no text"  # not what it is: prompts are never told
        raise ValueError(f"{where}: `prompt` is {what}; it must be a text that is not empty.")
    if "id" in row:
        row["id"] = str(row["id"])
    row = defaults | row
    for key, value in row.items():
        check_text(value, f"{where}: `{key}`")
    for key in ("domain", "group"):
        if key in row and not (isinstance(row[key], str) and row[key]):
            raise ValueError(f"{where}: `{key}` is {row[key]!r}; it must be a text that is not empty, or left out.")
    return row


def check_text(value: object, what: str):
    """See that a text can be written down: half of a pair of surrogates cannot, and no tokenizer takes it. Others are not looked at.

    Raises:
        ValueError: if it has one; the text is not told.
    """
    if isinstance(value, str) and (half := _HALF.search(value)):
        raise ValueError(
            f"{what} has half a character, \\u{ord(half[0]):04x}, at its {half.start() + 1}. place, as where a text was cut within an emoji; "
            "write the whole character, or leave it out."
        )


def read_hub(name: str, count: int) -> list[dict]:
    """The first `count` prompts of a dataset on the Hub, `hub:owner/name[/config][:split[:field]]`.

    Raises:
        ValueError: if the name is malformed, or the dataset has no such field, or a row of it is not a text.
        OSError: if the Hub has no such dataset, or cannot be reached.
    """
    path, *rest = name.removeprefix("hub:").split(":")
    parts = path.split("/")
    if len(parts) not in (2, 3) or not all(parts) or len(rest) > 2 or not all(rest):
        raise ValueError(f"`stream` {name!r} names no dataset; write hub:owner/name[/config][:split[:field]].")
    split, field = [*rest, *("train", "prompt")[len(rest) :]]

    from datasets import load_dataset

    dataset = load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    if field not in dataset.column_names:
        raise ValueError(
            f"{name}: no field {field!r}; choose one of {dataset.column_names}: hub:{path}:{split}:FIELD."
        )
    rows: dict[str, dict] = {}
    for i, row in enumerate(dataset):
        if len(rows) == count:
            break
        prompt = row[field]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{name}, row {i}: `{field}` is empty or no text; it must be a text that is not empty.")
        check_text(prompt, f"{name}, row {i}: `{field}`")
        rows.setdefault(prompt, {"prompt": prompt, "domain": parts[1], "id": str(i)})
    if not rows:
        raise ValueError(f"{name}: no prompts in it; choose another split.")
    return list(rows.values())


def _distinct(rows: list[dict], where: str) -> list[dict]:
    """The rows without those whose prompt came before, in this domain."""
    distinct = {}
    for row in rows:
        distinct.setdefault((row["domain"], row["prompt"]), row)
    if not distinct:
        raise ValueError(f'{where}: no prompts in it; write a JSON object such as {{"prompt": "…"}} a line.')
    if len(distinct) < len(rows):
        logger.info("%s: left out %d prompts seen before.", where, len(rows) - len(distinct))
    return list(distinct.values())


# The running Python's own standard library: docstrings → code

# Not for users of the library (tests, vendored tools, tables), or split off by some distributions, so that most Pythons of a version
# have the same files.
_NOT_LIBRARY = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "tkinter",
    "turtledemo",
}


def stdlib_prompts(count: int, seed: int) -> list[dict]:
    """Up to `count` requests for a function, each out of a docstring of the standard library (about 700 to be had).

    The sources are parsed, never imported or run. The same seed and Python give the same prompts.

    Raises:
        OSError: if this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    rows, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _NOT_LIBRARY.isdisjoint(parts) and not any(
            (p.startswith("_") and p != "__init__") or "-" in p for p in parts
        ):
            module = ".".join(part for part in parts if part != "__init__")
            for name, prompt, text in _requests(path):
                # ntpath says of most functions what posixpath says.
                if text not in seen:
                    seen.add(text)
                    rows.append({"prompt": prompt, "domain": "stdlib", "id": f"{module}.{name}"})
    if not rows:
        raise FileNotFoundError(
            f"{root} has no .py sources of the standard library: use a Python that comes with them, or a JSONL file of prompts."
        )
    random.Random(f"stdlib:{seed}").shuffle(rows)
    return rows[:count]


def _requests(path: Path) -> Iterator[tuple[str, str, str]]:
    """Of each public function whose docstring's first paragraph says enough: its name, the prompt, and that paragraph."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and bad-encoding samples that only look like modules
        return
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        signature = f"{node.name}({ast.unparse(node.args)})"
        # Grammars and tables do not begin with a capital; an interactive session or a long signature makes an odd request.
        if text[:1].isupper() and len(text.split()) in WORDS and ">>>" not in text and len(signature) <= 80:
            yield node.name, f"Write a Python function `{signature}`. {text}", text


# Maths word problems of reasoning-gym


def word_problems(count: int, seed: int) -> list[dict]:
    """`count` distinct maths word problems: reasoning-gym's gsm_symbolic, 85 texts with names and numbers filled in.

    `group` is the text they are made of.

    Raises:
        OSError: if reasoning-gym is not installed.
    """
    with _part_of("reasoning_gym", ("arithmetic",), "pip install --no-deps reasoning-gym==0.1.25"):
        importlib.import_module("reasoning_gym.coaching")  # first, or it and the factory import each other
        gsm = importlib.import_module("reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic")
        # Problem i is drawn with seed + i: seeds next to each other would share most of their draws.
        start = random.Random(f"word_problems:{seed}").randrange(2**31)
        problems = gsm.GSMSymbolicDataset(gsm.GSMSymbolicDatasetConfig(seed=start, size=2 * count + 200))
        rows = {}
        for i in range(len(problems)):
            if len(rows) == count:
                break
            # What the dataset appends asks for the bare number; without it, a model reasons as it would for a user.
            prompt = problems[i]["question"].removesuffix(
                " Give the result as your final answer. Do not include units."
            )
            if len(prompt.split()) in WORDS:
                group = f"gsm_symbolic-{problems.task_indices[i]}"
                rows.setdefault(
                    prompt, {"prompt": prompt, "domain": "word_problems", "id": f"{group}-{i}", "group": group}
                )
    return list(rows.values())


@contextlib.contextmanager
def _part_of(package: str, folders: tuple[str, ...], install: str) -> Iterator[None]:
    """Within the block, modules below `package` can be imported without what its own `__init__` imports.

    reasoning_gym's imports every dataset it has, and with them requirements that compile C. Afterwards `package` is as if it had
    never been touched, so that whoever has those requirements can import the whole.

    Raises:
        OSError: if the package is not installed.
    """
    spec = find_spec(package)  # of a top-level name: finds, does not import
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The package {package} is not installed. Install it with: {install}")
    if package in sys.modules:  # whole already
        yield
        return
    root = Path(spec.submodule_search_locations[0])
    try:
        for name, where in [(package, root), *((f"{package}.{folder}", root / folder) for folder in folders)]:
            bare = types.ModuleType(name)
            bare.__path__ = [str(where)]
            sys.modules[name] = bare
        yield
    finally:
        for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
            del sys.modules[name]


_BUILT_IN: dict[str, Callable[[int, int], list[dict]]] = {"stdlib": stdlib_prompts, "word_problems": word_problems}
