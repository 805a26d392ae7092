"""Reads and writes traces: feedback in a safetensors file, to learn from again without the target. They hold prompts as token ids, so they are written
only on request."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.feedback.target_states import TargetStates
from hf_osd.system.files import staged

_FORMAT = "hf_osd.trace.1"
# Fields with a row for each position, in the order of `Feedback`; those of shape `(N, k)` are stored flat, for k may differ by request.
_SPARSE = ("top_ids", "top_logps", "draft_logps")
_DENSE = ("tail_logp", "drafted", "drafted_logp", "outcome", "overlap")
_ROWS = ("top_ids", "top_logps", "tail_logp")  # of `SparseLogits`
_FACTS = ("tokens", "prompt", "k", "source", "sampled", "age")  # the columns of `facts`
# Log-probs of one request share a dtype; where requests differ, the tensor `dtypes` has the index of each one's.
_LOGPS = ("top_logps", "tail_logp", "draft_logps", "drafted_logp")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def write_trace(path: str | os.PathLike, feedback: Sequence[Feedback], facts: dict[str, str] | None = None):
    """Write requests to a safetensors file that only its owner may read; an older file is replaced at once, or not at all.

    Args:
        path: the file; its folder must exist.
        feedback (`Sequence[Feedback]`): the requests, in order.
        facts (`dict[str, str]`, *optional*): more text to keep in the file's metadata.

    Raises:
        OSError: if the file cannot be written.
    """
    from safetensors.torch import save

    tensors = pack(feedback)
    data = save(tensors, metadata={**(facts or {}), "format": _FORMAT})
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"No folder {path.parent} to write {path.name} into; make it first.")
    with (
        staged(path.parent) as staging,
        os.fdopen(os.open(staging / path.name, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file,
    ):
        file.write(data)


def pack(feedback: Sequence[Feedback]) -> dict[str, Tensor]:
    """Pack requests into a few tensors, for a file or for another process; `unpack` restores them, with the age that they have now."""
    now = time.monotonic()
    rows = [
        (
            len(one.tokens),
            one.prompt_length,
            one.top_ids.shape[1],
            -1 if one.source is None else len(one.source),
            one.sampled,
            now - one.created,
        )
        for one in feedback
    ]
    tensors = {"facts": torch.tensor(rows, dtype=torch.float64, device="cpu").reshape(len(rows), len(_FACTS))}
    if feedback:
        tensors["tokens"] = torch.cat([one.tokens for one in feedback])
        for name in (*_SPARSE, *_DENSE):
            tensors[name] = torch.cat([getattr(one, name).flatten() for one in feedback])
        if tensors["draft_logps"].isnan().all():  # nothing was drafted: NaN would fill a quarter of the file
            tensors["draft_logps"] = tensors["draft_logps"][:0].clone()
        dtypes = [one.top_logps.dtype for one in feedback]
        if len(set(dtypes)) > 1:  # `cat` has promoted them to the widest, which is exact
            tensors["dtypes"] = torch.tensor(
                [_DTYPES.index(dtype) for dtype in dtypes], dtype=torch.uint8, device="cpu"
            )
        sources = [one.source for one in feedback if one.source is not None]
        if sources:
            tensors["source"] = torch.cat(sources)
        prompts = [one.prompt_rows for one in feedback]
        if any(prompts):
            known = [0 if rows is None else len(rows) for rows in prompts]
            tensors["prompt_rows"] = torch.tensor(known, device="cpu")
            for name in _ROWS:
                tensors[f"prompt_{name}"] = torch.cat([getattr(rows, name).flatten() for rows in prompts if rows])
        states = [one.states for one in feedback]
        if any(one is not None for one in states):
            shapes = [(0, 0, 0, -1) if one is None else (len(one), one.width, one.n_aux, one.start) for one in states]
            tensors["states"] = torch.tensor(shapes, dtype=torch.int64, device="cpu")
            for name in ("codes", "scales"):
                tensors[f"state_{name}"] = torch.cat(
                    [getattr(one, name).flatten() for one in states if one is not None]
                )
    return tensors


def read_trace(path: str | os.PathLike) -> tuple[list[Feedback], dict[str, str]]:
    """Read a trace; return the requests, with the age that they had when written, and the facts.

    Raises:
        OSError: if there is no such file.
        ValueError: if it is not a trace, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise FileNotFoundError(f"No trace at {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r} in place of {_FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        requests = unpack(tensors)
    except (SafetensorError, LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(f"{path} is no trace that hf_osd can read ({error}); record it again.") from error
    return requests, {name: value for name, value in metadata.items() if name != "format"}


def unpack(tensors: dict[str, Tensor]) -> list[Feedback]:
    """Restore the requests that were packed. Damaged tensors raise some error, of any type."""
    facts = dict(zip(_FACTS, tensors["facts"].T.tolist(), strict=True))
    lengths, ks = [int(n) for n in facts["tokens"]], [int(k) for k in facts["k"]]
    answers = [n - int(prompt) for n, prompt in zip(lengths, facts["prompt"], strict=True)]
    if not lengths:
        return []
    flat = [n * k for n, k in zip(answers, ks, strict=True)]
    if not len(tensors["draft_logps"]):
        tensors["draft_logps"] = torch.full_like(tensors["top_logps"], torch.nan)
    columns: dict[str, list] = {"tokens": list(tensors["tokens"].split(lengths))}
    for name in _SPARSE:
        parts = tensors[name].split(flat)
        columns[name] = [part.view(n, k) for part, n, k in zip(parts, answers, ks, strict=True)]
    for name in _DENSE:
        columns[name] = list(tensors[name].split(answers))
    if "dtypes" in tensors:
        dtypes = [_DTYPES[i] for i in tensors["dtypes"].tolist()]
        for name in _LOGPS:
            columns[name] = [part.to(dtype) for part, dtype in zip(columns[name], dtypes, strict=True)]
    has_source = [int(n) >= 0 for n in facts["source"]]
    sources = iter(tensors["source"].split([int(n) for n in facts["source"] if n >= 0]) if any(has_source) else ())
    prompts = _unpack_prompts(tensors, ks, columns)
    states = _unpack_states(tensors, len(lengths))
    now = time.monotonic()
    # Each request gets its own memory: a view would keep the whole file in memory until the last request is dropped.
    return [
        Feedback(
            **{name: parts[i].clone() for name, parts in columns.items()},
            prompt_length=int(facts["prompt"][i]),
            sampled=bool(facts["sampled"][i]),
            created=now - facts["age"][i],
            source=next(sources).clone() if has_source[i] else None,
            prompt_rows=prompts[i],
            states=states[i],
        )
        for i in range(len(lengths))
    ]


def _unpack_prompts(tensors: dict[str, Tensor], ks: list[int], columns: dict[str, list]) -> list[SparseLogits | None]:
    """Restore the `prompt_rows` of each request, with its k and the dtype of its other log-probs."""
    if "prompt_rows" not in tensors:
        return [None] * len(ks)
    counts = tensors["prompt_rows"].tolist()
    flat = [n * k for n, k in zip(counts, ks, strict=True)]
    ids, logps = (tensors[f"prompt_{name}"].split(flat) for name in _ROWS[:2])
    tails = tensors["prompt_tail_logp"].split(counts)
    return [
        SparseLogits(
            ids[i].view(n, k).clone(),
            logps[i].view(n, k).to(columns["top_logps"][i].dtype, copy=True),
            tails[i].to(columns["top_logps"][i].dtype, copy=True),
        )
        if n
        else None
        for i, (n, k) in enumerate(zip(counts, ks, strict=True))
    ]


def _unpack_states(tensors: dict[str, Tensor], count: int) -> list[TargetStates | None]:
    """`states` of each request; of none in a file from before there were any."""
    if "states" not in tensors:
        return [None] * count
    shapes = tensors["states"].tolist()
    codes = tensors["state_codes"].split([n * width for n, width, _, _ in shapes])
    scales = tensors["state_scales"].split([n * n_aux for n, _, n_aux, _ in shapes])
    return [
        None if start < 0 else TargetStates(codes[i].view(n, width).clone(), scales[i].view(n, n_aux).clone(), start)
        for i, (n, width, n_aux, start) in enumerate(shapes)
    ]
