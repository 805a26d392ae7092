"""`choose_learning`: lets all weights learn, an adapter, or nothing, by the memory that learning takes and the memory there is. Arithmetic over a few facts of the
draft; `available` alone asks the machine.

Sizes are estimates from above: of what stays, and of one forward and backward pass, over texts of at most 1,024 tokens. The rest of what is available is for what is not
counted: requests longer than that, the allocator's gaps, judging, the buffer."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_osd.distill.micro_batches import TOKENS_AT_ONCE
from hf_osd.distill.ranks import RankGroup
from hf_osd.models.lora import adaptable, can_merge
from hf_osd.models.properties import reads_states

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig

GIB = 2**30
# All weights learn where that takes no more than this share of what is available, and no more than so much.
ALL_WEIGHTS_SHARE, ALL_WEIGHTS_BYTES = 0.2, 4 * GIB
# What learning may take of what is available, unless the config has a budget.
BUDGET_SHARE = 0.5

# The buffer of feedback, and how many of the target's states it has room for besides; at most this share of what is available.
BUFFER_BYTES, BUFFER_STATES, BUFFER_SHARE = 64 * 2**20, 2**17, 0.125

_TOKENS = 1024  # of a request, or as many as the draft has positions for
# Bytes of logits to one of their float32 numbers: themselves, their log-softmax, its gradient and theirs.
_LOGITS = 4


@dataclass(frozen=True)
class LearningFacts:
    """Holds the facts of a draft that the estimate is made from.

    Args:
        trainable (`int`): weights that learn where all do.
        frozen (`int`): the other weights.
        adapted (`int`): weights of the linear layers that get an adapter.
        ends (`int`): Σ (inputs + outputs) of these layers: an adapter of rank r has r times as many weights.
        merges (`bool`): the adapter is merged into the weights that serve.
        quantised (`bool`): the layers' weights are no floats, and cannot learn.
        itemsize (`int`): bytes a serving weight.
        hidden, layers, heads, vocabulary (`int`): sizes of the draft.
        tokens (`int`): in the longest request that is reckoned with.
        batch (`int`): requests an optimizer step.
        columns (`int`): columns of the logits in one step.
        eager (`bool`): attention stores its scores.
        autocast (`bool`): forward passes run in 16 bits over frozen weights as they serve, not in float32 over float32 copies.
        averages (`bool`): weights are averaged over steps.
        members (`int`): students in the ensemble.
        apart (`bool`): the learner has a draft of its own, on another device or in another process.
        steps (`int`): that a feature-level draft is unrolled in training, whose activations and logits are kept together; 1 of any other.
        state (`int`): numbers of a state of the target that such a draft reads; 0 of any other.
    """

    trainable: int
    frozen: int
    adapted: int = 0
    ends: int = 0
    merges: bool = True
    quantised: bool = False
    itemsize: int = 4
    hidden: int = 0
    layers: int = 0
    heads: int = 0
    vocabulary: int = 0
    tokens: int = _TOKENS
    batch: int = 2
    columns: int = 0
    eager: bool = False
    autocast: bool = False
    averages: bool = True
    members: int = 1
    apart: bool = False
    steps: int = 1
    state: int = 0

    @classmethod
    def of(
        cls,
        draft: PreTrainedModel,
        trainable: set[str],
        linears: dict[str, nn.Module],
        config: OnlineConfig,
        merges: bool = True,
    ) -> LearningFacts:
        """Collect the facts of a draft, of which `trainable` would learn where all weights do, and the layers `linears` would get an adapter."""
        from hf_osd.distill.scoring import learners_dtype
        from hf_osd.models.draft_head import can_select_rows
        from hf_osd.models.properties import draft_window

        model = draft.config.get_text_config(decoder=True)
        counts = {name: p.numel() for name, p in draft.named_parameters()}
        learnt = sum(count for name, count in counts.items() if name in trainable)
        batch = config.batch_size or config.requests_an_update
        vocabulary = draft.get_output_embeddings().weight.shape[0]
        # Where columns are drawn they are fewer than half; above that all are computed.
        samples = math.inf if config.sampled_columns is None else config.sampled_columns
        sampled = samples < vocabulary // 2 and can_select_rows(draft)
        states = reads_states(draft)
        steps = config.unrolled_steps if states else 1
        return cls(
            trainable=learnt,
            frozen=sum(counts.values()) - learnt,
            adapted=sum(linear.weight.numel() for linear in linears.values()),
            ends=sum(sum(ends_of(linear)) for linear in linears.values()),
            merges=merges,
            quantised=any(not linear.weight.is_floating_point() for linear in linears.values()),
            itemsize=draft.dtype.itemsize,
            hidden=draft.get_input_embeddings().weight.shape[-1],
            layers=getattr(model, "num_hidden_layers", 1) * (2 if draft.config.is_encoder_decoder else 1),
            heads=getattr(model, "num_attention_heads", None) or 1,
            vocabulary=vocabulary,
            tokens=int(min(_TOKENS, draft_window(draft))),
            batch=batch,
            columns=vocabulary // 2 if sampled else vocabulary,
            eager=getattr(model, "_attn_implementation", None) == "eager" or steps > 1,
            autocast=learners_dtype(config, draft) is not None,
            averages=bool(config.ema_decay),
            members=len(config.ensemble or [1]),
            apart=config.learn == "process" or config.learner_device is not None,
            steps=steps,
            state=len(draft.config.recorded_layers) * draft.config.target_hidden_size if states else 0,
        )

    @property
    def activations(self) -> int:
        """Estimate the bytes of one optimizer step: s·b·h·(34 + 5·a·s/h) a layer in 16 bits (Korthikanti et al. 2022, arXiv 2205.05198, eq. 2), the second
        summand where attention stores its scores, of as many requests as are read at once ([`hf_osd.distill.micro_batches`]); twice that in float32; and the logits, in float32. All that once a step that a draft is unrolled; and the
        states that such a draft reads: as they come, in float32, and three times for norms and projection."""
        s, b, h = self.tokens, self.batch, self.hidden
        read = min(s * b, max(s, TOKENS_AT_ONCE))
        layer = read * h * 34 + (5 * self.heads * s * read if self.eager else 0)
        step = layer * self.layers * (1 if self.autocast else 2) + read * self.columns * 4 * _LOGITS
        return step * self.steps + (s * b + 3 * read) * self.state * 4


def ends_of(linear: nn.Module) -> tuple[int, int]:
    """Return inputs and outputs of an `nn.Linear`, or of a transformers `Conv1D`."""
    return getattr(linear, "in_features", None) or linear.nx, getattr(linear, "out_features", None) or linear.nf


def learning_bytes(facts: LearningFacts, rank: int | None = None) -> int:
    """Estimate the bytes that learning takes on top of the same draft frozen: with all of its weights, or in an adapter of `rank`."""
    n = facts.trainable if rank is None else rank * facts.ends
    average = 4 if facts.averages else 0
    # For each student float32 weights, gradients and Adam's two moments, the average over steps; and at most three snapshots of weights and average, as in a
    # search for the rate: before it, the best so far, the one being tried. Later there is none.
    weights = n * facts.members * (4 + 4 + 8 + average + 3 * (4 + average))
    # Static, accepted and candidate, as they serve; an adapter's are float32.
    weights += 3 * n * (facts.itemsize if rank is None else 4)
    # Copies that serve and are written to: the second of all weights; two of those that an adapter is merged into, or two of an adapter.
    if rank is None:
        weights += n * facts.itemsize
    else:
        weights += 2 * (facts.adapted * facts.itemsize if facts.merges else n * 4)
    whole = facts.trainable + facts.frozen
    if facts.apart:
        weights += whole * facts.itemsize
    if not facts.autocast and facts.itemsize != 4:
        weights += 4 * facts.members * (facts.frozen if rank is None else whole)
    return weights + facts.activations


@dataclass(frozen=True)
class LearningChoice:
    """Names the weights that learn.

    Args:
        learns (`bool`): anything learns.
        rank (`int`, *optional*): of the adapter that hf_osd puts on the draft; `None` where it puts none.
        sentence (`str`): the choice and its reason, to be read.
    """

    learns: bool
    rank: int | None
    sentence: str


def choose(
    facts: LearningFacts,
    adapter: str,
    rank: int,
    available: float,
    budget: int | None = None,
    has_adapter: bool = False,
) -> LearningChoice:
    """Choose what learns within a budget of memory: all weights, an adapter of at most `rank`, or nothing.

    Args:
        facts (`LearningFacts`): of the draft.
        adapter (`str`): as in the config: `"auto"`, `"lora"` or `"off"`.
        rank (`int`): to begin with; it comes down by halves until the adapter fits.
        available (`float`): bytes that are free where it learns; infinite if unknown.
        budget (`int`, *optional*): bytes that learning may take; half of what is available if left out.
        has_adapter (`bool`): the draft came with an adapter of its own, which is then what learns.
    """
    limit = BUDGET_SHARE * available if budget is None else budget
    is_asked = "memory_budget" if budget is not None else f"half of the {size(available)} that are free"
    if math.isinf(limit):
        is_asked = "how much is free is not known"
    needed = learning_bytes(facts)
    what = "The adapter that the draft came with learns" if has_adapter else "All weights learn"
    fits = f"{what}, {facts.trainable / 1e6:.1f} million, in about {size(needed)} of {size(limit)} ({is_asked})."
    whole = adapter == "off" or has_adapter or (adapter == "auto" and not facts.ends)
    if adapter == "auto" and facts.trainable and not facts.quantised:
        whole |= needed <= min(ALL_WEIGHTS_SHARE * available, ALL_WEIGHTS_BYTES, limit)
    if whole:
        if needed <= limit:
            return LearningChoice(True, None, fits)
        smaller = "" if has_adapter or not facts.ends else " or pass adapter='auto',"
        return _off(
            f"{what.removesuffix(' learns').removesuffix(' learn')} would take", needed, limit, is_asked, smaller
        )
    fitting = rank
    while fitting > 1 and learning_bytes(facts, fitting) > limit:
        fitting //= 2
    needed_by_it = learning_bytes(facts, fitting)
    if needed_by_it > limit:
        return _off("The smallest LoRA adapter, of rank 1, would take", needed_by_it, limit, is_asked)
    why = "as asked" if adapter == "lora" else f"where all weights would take {size(needed)}"
    if fitting < rank:
        why += f" and rank {rank} {size(learning_bytes(facts, rank))}"
    return LearningChoice(
        True,
        fitting,
        f"A LoRA adapter of rank {fitting} learns in about {size(needed_by_it)} of {size(limit)} ({is_asked}), {why}.",
    )


def _off(what: str, needed: int, limit: float, is_asked: str, smaller: str = "") -> LearningChoice:
    return LearningChoice(
        False,
        None,
        f"Learning is off, and the draft serves as it is: {what[0].lower()}{what[1:]} about {size(needed)} of memory, of {size(limit)} that learning may take "
        f"({is_asked}). Raise memory_budget,{smaller} lower batch_size, free memory, or pass learn=False.",
    )


def size(number: float) -> str:
    """Format bytes, to be read."""
    if math.isinf(number):
        return "any amount"
    if number < 2**20:
        return f"{number / 2**10:.1f} KiB"
    return f"{number / 2**20:.1f} MiB" if number < GIB else f"{number / GIB:.1f} GiB"


def available(device: torch.device | str) -> float:
    """Find out how many bytes this process can still have on `device`; infinite where that is not known."""
    import torch

    with contextlib.suppress(
        RuntimeError, AssertionError, ValueError, OSError
    ):  # no such device: whoever puts the draft there finds out
        device = torch.device(device)
        if device.type == "cpu":
            import psutil

            return min(psutil.virtual_memory().available, cgroup_left())
        if device.type == "cuda":
            cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            return torch.cuda.mem_get_info(device)[0] + cached
        if device.type == "mps":
            return max(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(), 0)
    return math.inf


def buffer_bytes(draft: PreTrainedModel | None, config: OnlineConfig) -> int:
    """Return the bound on feedback in memory: the config's, or one by what the draft reads. States take most of a request: 3·4096 numbers a token are 12 KiB, and 64 MiB
    would hold 27 requests of 192 tokens."""
    if config.buffer_bytes is not None:
        return config.buffer_bytes
    if draft is None or not reads_states(draft):
        return BUFFER_BYTES
    layers = len(draft.config.recorded_layers)
    state = layers * (draft.config.target_hidden_size + 2)  # int8, and a float16 for each layer
    most = min(BUFFER_SHARE * available("cpu"), BUFFER_BYTES + BUFFER_STATES * state)
    return max(int(most), BUFFER_BYTES)


def cgroup_left(root: str | Path = "/sys/fs/cgroup", of_process: str | Path = "/proc/self/cgroup") -> float:
    """Find out how many bytes this process's control groups leave it, by version 2 or 1; infinite without one.

    Files in the page cache count as used there until somebody needs the room, as a checkpoint that has just been read: what of them is inactive is left too.
    """
    left = math.inf
    for folder, limit, usage, cached in _cgroups(Path(root), Path(of_process)):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            room = int((folder / limit).read_text()) - int((folder / usage).read_text())
            with contextlib.suppress(OSError, ValueError, KeyError):
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                room += int(stat[cached])
            left = min(left, max(room, 0))
    return left


def _cgroups(root: Path, of_process: Path) -> Iterator[tuple[Path, str, str, str]]:
    """Yield the folders of the process's groups and of the groups around them, with their version's names for limit, usage and cached files."""
    try:
        lines = of_process.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's, of which it sees the end alone, as its root.
        own = Path(path.strip("/"))
        for folder in (own, *own.parents):
            if ".." not in folder.parts:
                yield top / folder, *names


def choose_learning(draft: PreTrainedModel, trainable: set[str], config: OnlineConfig) -> LearningChoice:
    """Choose what of a draft learns, by the config and the memory there is where it would learn; in a job of several processes the same on all of them.

    Raises:
        ValueError: if it is to be an adapter and nothing of the draft can have one, or the draft has one that cannot learn.
    """
    has_adapter = bool(getattr(draft, "peft_config", None))
    if has_adapter:
        _check_head(draft)
    linears = {} if has_adapter else adaptable(draft, trainable)
    if config.adapter == "lora" and reads_states(draft):
        raise ValueError(
            "adapter='lora', and the draft reads the target's hidden states: its one layer learns whole, for it begins at random. Pass adapter='auto', or "
            "learn=False."
        )
    if config.adapter == "lora" and not has_adapter and not linears:
        raise ValueError(
            f"adapter='lora', and {type(draft).__name__} has no linear layer in its decoder layers that could have one. Pass adapter='off', which learns "
            "all weights, or learn=False."
        )
    free = available(config.learner_device or draft.device)
    if config.learn == "inline" and (ranks := RankGroup.of_job()).size > 1:
        free = -ranks.most(-int(min(free, 2**53)))  # of the poorest: all must learn the same
    facts = LearningFacts.of(draft, trainable, linears, config, can_merge(linears))
    return choose(facts, config.adapter, config.lora, free, config.memory_budget, has_adapter)


def _check_head(draft: PreTrainedModel):
    """See that an adapter that lies on the LM head could learn there."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = draft.get_output_embeddings()
    if isinstance(head, BaseTunerLayer) and not all(
        tensor.is_floating_point()
        for name, tensor in itertools.chain(head.named_parameters(), head.named_buffers())
        if "lora_" not in name
    ):
        raise ValueError(
            f"The draft's adapter lies on its LM head, a {type(head.get_base_layer()).__name__} whose weights are quantised: no loss can be learnt through "
            "that. Make the adapter without the head (exclude_modules=['lm_head']), leave the head unquantised, or pass learn=False."
        )
