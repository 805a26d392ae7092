"""Prompt streams: JSONL files, Hub datasets, and two built in that need no download (the standard library, word problems).
A row is a dict with `prompt`, `domain`, `id` and, where prompts are variants of each other, `group`. This file knows nothing of tokenizers or models.
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
_HALF = re.compile("[\ud800-\udfff]")  # one half of a surrogate pair
WORDS = range(6, 81)  # how long a built-in prompt's text may be; 80 words are about 100 tokens


def load_streams(spec: str, seed: int | None = 0, count: int = 1000) -> list[tuple[str, list[dict]]]:
    """Load the streams that `spec` names, in its order: `[(domain, rows), …]`.

    Args:
        spec: comma-separated: `stdlib`, `word_problems`, JSONL files (see `read_stream`), or
            `hub:owner/name[/config][:split[:field]]` for a dataset on the Hub (split `train` and field `prompt` by default).
            A file whose rows name several domains counts as several streams.
        seed: chooses and orders the prompts of built-in streams; None is 0. Files and datasets keep their own order.
        count: largest number of rows of a stream that is not a file.

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


def load_stream(spec: str, seed: int | None = 0) -> tuple[str, list[dict]]:
    """Load the one stream that `spec` names: `(domain, rows)`.

    Raises:
        ValueError, OSError: as [`load_streams`], and if there are several domains.
    """
    streams = load_streams(spec, seed)
    if len(streams) > 1:
        raise ValueError(f"`stream` {spec!r} has the domains {', '.join(name for name, _ in streams)}; name one.")
    return streams[0]


def split_held_back(rows: list[dict], count: int, seed: int | None, name: str) -> tuple[list[dict], list[dict]]:
    """Split a stream into `count` held-back rows and the rest: `(held back, rest)`, both in the stream's order.

    Rows of one `group` are alike (one text with other names and numbers; questions about one database). A group is therefore on one side
    only, or a draft would be scored on what it has learnt by heart. At most `count` groups, and at most a third of them, are set aside; the
    held-back rows are taken from these groups in turn, and their other rows are left out.

    Raises:
        ValueError: if the stream has too few prompts, or groups of prompts, to leave any.
    """
    groups: dict = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.get("group", i), []).append(i)  # a row without a group is a group of its own
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
    """Read a JSONL file: an object a line, with `prompt` and, optionally, `domain`, `id` and `group`. Rows keep their order.

    A row's `domain` defaults to the file's stem and its `id` to the line's number. Blank lines and repeated prompts are left out.
    The file is UTF-8, or what its byte order mark says; further marks, as in concatenated files, are skipped.

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
    stem = path.stem.encode(
        "utf-8", "replace"
    ).decode()  # Python represents a name that is not UTF-8 with lone surrogates
    for number, line in enumerate(_lines(path), start=1):
        if line.strip():
            rows.append(_parse(line, f"{path}, line {number}", {"domain": stem, "id": str(number)}))
    return _distinct(rows, str(path))


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a text file as UTF-8; each may still be malformed."""
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
    except (ValueError, RecursionError) as error:  # bad encoding or bad JSON
        raise ValueError(
            f'{where}: {error}. A line is one JSON object in UTF-8, such as {{"prompt": "…"}}.'
        ) from error
    if not isinstance(row, dict):
        raise ValueError(f'{where}: {type(row).__name__} in place of an object such as {{"prompt": "…"}}.')
    row = {key: row[key] for key in ("prompt", "domain", "id", "group") if row.get(key) is not None}
    if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        what = "lacking" if row.get("prompt") is None else "empty or no text"  # prompts are never quoted
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
    """Check that a text has no lone surrogate, which cannot be encoded and which tokenizers refuse. Values that are not texts pass.

    Raises:
        ValueError: if it has one; the message does not quote the text.
    """
    if isinstance(value, str) and (half := _HALF.search(value)):
        raise ValueError(
            f"{what} has half a character, \\u{ord(half[0]):04x}, at its {half.start() + 1}. place, as where a text was cut within an emoji; "
            "write the whole character, or leave it out."
        )


def read_hub(name: str, count: int) -> list[dict]:
    """Read the first `count` prompts of a dataset on the Hub, `hub:owner/name[/config][:split[:field]]`.

    Raises:
        ValueError: if the name is malformed, the dataset has no such field, or a row's field is not a text.
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
    """Drop rows whose prompt came before in the same domain."""
    distinct = {}
    for row in rows:
        distinct.setdefault((row["domain"], row["prompt"]), row)
    if not distinct:
        raise ValueError(f'{where}: no prompts in it; write a JSON object such as {{"prompt": "…"}} a line.')
    if len(distinct) < len(rows):
        logger.info("%s: left out %d prompts seen before.", where, len(rows) - len(distinct))
    return list(distinct.values())


# The running Python's own standard library: docstrings → code

# Left out: not for users of the library (tests, vendored tools, tables), or missing in some distributions. So most Pythons of a version
# give the same prompts.
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
    """Make up to `count` requests for a function, each from a docstring of the standard library, which has about 700 that suit.

    The sources are parsed, never imported or run. The same seed and Python give the same prompts.

    Raises:
        OSError: if this Python comes without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    rows, seen = [], set()
    for path in sorted(_sources(root)):
        parts = path.relative_to(root).with_suffix("").parts
        if _NOT_LIBRARY.isdisjoint(parts) and not any(
            (p.startswith("_") and p != "__init__") or "-" in p for p in parts
        ):
            module = ".".join(part for part in parts if part != "__init__")
            for name, prompt, text in _requests(path):
                # ntpath and posixpath share most docstrings.
                if text not in seen:
                    seen.add(text)
                    rows.append({"prompt": prompt, "domain": "stdlib", "id": f"{module}.{name}"})
    if not rows:
        raise FileNotFoundError(
            f"{root} has no .py sources of the standard library: use a Python that comes with them, or a JSONL file of prompts."
        )
    random.Random(f"stdlib:{seed}").shuffle(rows)
    return rows[:count]


def _sources(root: Path) -> Iterator[Path]:
    """Yield the files `*.py` of the library, without a look into folders that are none of it: site-packages may have many times as many."""
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _requests(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield name, prompt and first paragraph of the docstring for each public function whose docstring is long enough."""
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
    """Make `count` distinct maths word problems with reasoning-gym's gsm_symbolic: 85 templates with names and numbers filled in.

    A row's `group` is its template.

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
            # The dataset appends a request for the bare number; without it a model reasons as it would for a user.
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
    """Within the block, import modules below `package` without running its `__init__`.

    reasoning_gym's `__init__` imports every dataset it has, and with them requirements that compile C. Afterwards `package` is as if it had
    never been imported, so that whoever has those requirements can import the whole.

    Raises:
        OSError: if the package is not installed.
    """
    spec = find_spec(package)  # for a top-level name this does not import
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The package {package} is not installed. Install it with: {install}")
    if package in sys.modules:  # already imported as a whole
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
