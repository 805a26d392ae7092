"""`OnlineConfig`: every choice hf_osd makes, in one validated dataclass that is saved beside the draft's weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hf_osd.system.bounds import (
    Bound,
    above_zero,
    as_number,
    check_options,
    choice,
    is_number,
    number,
    option,
    switch,
    whole,
)
from hf_osd.system.strict_json import dumps, loads

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")
CONFIG_NAME = "osd_config.json"
# Fields of before: the values that asked for what is done now, with which a saved config still loads, and what is to be done with others.
_BY_REQUESTS = "an update is due after `update_interval` requests; set that, or call `update()` or `flush()`"
_OWN_ARGS = "leave it out, or train with `OnlineGKDTrainer(args=...)`"
REMOVED = {
    "assistant_confidence_threshold": ([0.0], "`lookahead='cost'` stops where the draft is not sure enough to pay"),
    "clear_after_update": (
        [False, True],
        "what has been learnt is learnt again as `replay_ratio` says; set `replay_ratio=0`",
    ),
    "draft_head_rank": ([64], "it is 64; leave it out"),
    "ensemble_sharpness": ([10.0], "it is 10; leave it out"),
    "held_back_share": ([0.0625], "every request is judged before it is learnt, and none is held back; leave it out"),
    "learner_threads": ([1], "a process that learns has one thread; leave it out"),
    "max_grad_norm": ([1.0], f"gradients are clipped to a norm of 1; {_OWN_ARGS}"),
    "optim": (["adamw_torch_fused", "adamw_torch"], f"the optimizer is AdamW, and Muon is gone; {_OWN_ARGS}"),
    "replay_by": (["uniform"], "past requests are drawn uniformly; leave it out"),
    "suffix_cache_tokens": ([16], "it is 16; leave it out"),
    "update_age": ([None], _BY_REQUESTS),
    "update_tokens": ([None], _BY_REQUESTS),
    "weight_decay": ([0.0], f"weights do not decay; {_OWN_ARGS}"),
}
# And those that have another name now, with which a saved config still loads.
RENAMED = {
    "averaging": "ema_decay",
    "draft_head_rows": "draft_vocab_size",
    "replay": "replay_ratio",
    "tail_samples": "sampled_columns",
}


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value  # as JSON gives it back


def _are_factors(values: Any) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(is_number(v) and 0 < v < math.inf for v in values)


@dataclass
class DraftingConfig:
    """What is drafted, and how much."""

    num_assistant_tokens: int = option(
        5, whole(1), "γ, the tokens drafted a round; the upper bound where `lookahead` chooses."
    )
    lookahead: str = option(
        "cost",
        choice("cost", "heuristic", "constant"),
        "How γ is chosen. 'cost' maximises expected tokens over expected time, by the draft's confidence and what the suffix cache proposes, and drafts "
        "nothing while that is below plain decoding; 'heuristic' is transformers' rule (+2 when all is accepted, else -1, at least 1); 'constant' always "
        "drafts `num_assistant_tokens`. These two draft with the draft alone, if there is one.",
    )
    draft_cost: float | None = option(
        None,
        above_zero().or_none(),
        "c, the time of one draft step over that of a one-token target step. Measured while serving if None; a fixed value makes γ, and so a seeded run, "
        "independent of the clock.",
    )
    verify_cost: float = option(
        0.0,
        number(0),
        "With `draft_cost` given: v(n) = 1 + verify_cost·(n-1), the time of verifying n tokens over that of one.",
    )
    verify_target: bool = option(
        True,
        switch(),
        "Whether to try, once for each target, configuration and kind of cache, that it says of several tokens at once what it says of them one at a time, "
        "in a few short forwards before the first block. One that does not decodes plainly. Without it a target is taken at its cache's word.",
    )
    suffix_cache: bool = option(
        True,
        switch(),
        "Whether recent verified text, the prompt's included, is a source of drafts too. It needs no draft model and learns at once; it is kept in memory, "
        "apart by tenant.",
    )
    suffix_cache_bytes: int = option(
        64 * 2**20, whole(1), "Bound on what the suffix cache holds, over all tenants. The oldest text goes first."
    )
    draft_head: str = option(
        "auto",
        choice("auto", "full", "traffic", "low_rank"),
        "Which rows of the draft's LM head are computed. 'full': all; 'traffic': those of the tokens that the traffic used of late, and the prompt's; "
        "'low_rank': at each step those whose logits a low-rank projection finds largest; 'auto': 'traffic' where the head has at least four times "
        "`draft_vocab_size` rows, else 'full'. The output stays exact: a token that is not among them is not drafted.",
    )
    draft_vocab_size: int = option(
        8192, whole(1), "How many rows `draft_head` computes, beside the prompt's; of 'low_rank', an eighth of it."
    )


@dataclass
class FeedbackConfig:
    """What is kept of a call, and for how long."""

    top_k: int = option(
        64, whole(1), "How many of the target's log-probs are kept a position; the rest is one tail bucket."
    )
    feedback_dtype: str = option("float16", choice("float16", "bfloat16", "float32"), "Storage of these log-probs.")
    positions: str = option(
        "all",
        choice("all", "error"),
        "'all' verified positions teach, or, as in the paper, only the 'error' position that ends each round.",
    )
    prompt_positions: int = option(
        256,
        whole(0),
        "Positions of a prompt, its last ones, that teach as well, at most: what the target makes of a prompt costs its LM head there and no forward. What a "
        "prompt shares with one of the last ones teaches once. 0 learns from answers alone.",
    )
    buffer_bytes: int = option(64 * 2**20, whole(1), "Bound on the feedback kept in memory. The oldest goes first.")
    buffer_age: float | None = option(
        None, above_zero().or_none(), "Feedback older than this many seconds is dropped. None keeps it."
    )


@dataclass
class LearningConfig:
    """How to learn, and what of it may serve."""

    update_interval: int = option(8, whole(1), "I in the paper: an update is due after this many requests.")
    replay_ratio: float = option(
        6.0, number(0), "Replayed requests for each new one in an update, drawn uniformly from the buffer."
    )
    batch_size: int | None = option(
        2, whole(1).or_none(), "Requests an optimizer step. None puts the whole update into one step."
    )
    learning_rate: str = option(  # or a number; flags know one type
        "auto",
        Bound(
            "give a number above 0, or 'auto'",
            lambda value: value == "auto" or (is_number(value) and 0 < value < math.inf),
            as_number,
        ),
        "'auto' tries a few rates, each with one pass and with as many as replay makes, on the first requests, goes on with the one that did best on the "
        "next, goes lower where what was learnt was worse, and up again where it was better. A number is obeyed.",
    )
    warmup_steps: int = option(
        10, whole(0), "Optimizer steps in which the learning rate rises to what it is; once, not once an update."
    )
    decay_steps: int | None = option(
        None,
        whole(1).or_none(),
        "After the warm-up the learning rate falls as 1/√(1 + steps since / decay_steps). None keeps it.",
    )
    ema_decay: float = option(
        0.98,
        Bound("give a number from 0 to below 1, such as 0.95", lambda value: is_number(value) and 0 <= value < 1),
        "Decay of the exponential moving average of the weights over optimizer steps, which is what serves. 0 serves the weights as they are.",
    )
    divergence: str = option(
        "forward_kl",
        choice(*DIVERGENCES),
        "The loss between target and draft; 'jsd' is the generalized one, with `beta`.",
    )
    beta: float = option(
        0.5,
        Bound("give a number from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1),
        "Mixture weight of 'jsd', in the sense of trl's GKD: M = beta·target + (1-beta)·draft.",
    )
    total_variation_weight: float = option(
        1.0,
        number(0),
        "Weight of a total variation term added to `divergence` (1 - Σ min(p, q), the rejection rate itself).",
    )
    sampled_columns: int | None = option(
        2048,
        whole(1).or_none(),
        "Columns of the LM head drawn, at each optimizer step, to stand for all those outside the targets' top k; the gradient is then an estimate, and the "
        "head no longer most of the work. None computes them all, as does a head of few columns.",
    )
    freeze_embeddings: bool = option(
        True, switch(), "Do not train input embeddings and LM head. They are then shared by all copies of the draft."
    )
    adapter: str = option(
        "auto",
        choice("auto", "lora", "off", true="lora", false="off"),
        "What learns of a draft that comes without an adapter. 'off': all weights; 'lora': a LoRA adapter over weights that stay as they are; 'auto': all "
        "weights where that takes at most a fifth of the memory there is, and 4 GiB, else the adapter. What serves has the adapter in its weights.",
    )
    lora: int = option(
        16, whole(1), "The rank of that adapter; it comes down by halves where learning would not fit into memory."
    )
    gate: bool = option(
        True,
        switch(),
        "Whether what was learnt serves only once requests that came since, judged before they are learnt, say that it is better, or no worse. Without it "
        "all that is learnt serves at once, as in the paper.",
    )
    gate_tolerance: float = option(
        0.01, number(0), "By how much α may be lower for 'no worse'. 1 lets through all that is not found to be worse."
    )
    optimism: float = option(
        0.0,
        number(0),
        "What serves is moved on by this many times the last optimizer step, as if the next gradient were the last one (optimistic online learning, arXiv "
        "2603.12617).",
    )
    ensemble: list[float] | None = option(  # noqa: RUF009 (its default is None)
        None,
        Bound("give a list of numbers above 0, such as [1, 2, 4]", _are_factors, _as_list).or_none(),
        "Learn at several rates at once, these multiples of `learning_rate`, and serve the average of the weights, each with a share ∝ exp(-10 · its loss so "
        "far, the mean rejection rate on the new requests of each update) (the same paper). Learning takes that many times as long.",
    )


@dataclass
class RunningConfig:
    """Where learning runs, when, and what it may take."""

    learn: str = option(
        "inline",
        choice("inline", "background", "process", "off", true="inline", false="off"),
        "When to learn. 'inline' (or True): between requests, in the thread that serves; 'background': in a thread beside it; 'process': in a process of its "
        "own, which is kinder to a CPU that serves; 'off' (or False) captures nothing and serves the draft as it is.",
    )
    learning_budget: float | None = option(
        None,
        above_zero("give a share above 0 up to 1", most=1).or_none(),
        "The share of the time that learning may take; a third inline, else a tenth, if left out. Inline that is of all the time that calls and learning "
        "take together, and an update learns as much as fits; beside serving it is of the time in which a call is served, and learning takes all there is "
        "while none is: in the background time on the wall, in a process that of one core, which at its low priority may stretch over much more.",
    )
    learning_window: int | None = option(
        1024,
        whole(1).or_none(),
        "Tokens of a request that are read to judge and to learn it, at most. Of a longer text that is where most of it teaches, with what comes before, and "
        "its first tokens. None reads all of it, however long that takes.",
    )
    memory_budget: int | None = option(
        None,
        whole(1).or_none(),
        "Bytes that learning may take, by estimate; half of what is free when the assistant is made if None. Where nothing fits, learning is off, and a "
        "warning says so.",
    )
    learner_device: str | None = option(
        None,
        Bound("give a device's name, such as 'cuda:1'", lambda value: isinstance(value, str)).or_none(),
        "Where to learn; on the draft's device if left out.",
    )
    learner_dtype: str = option(
        "auto",
        choice("auto", "float32", "bfloat16"),
        "Arithmetic of learning: 'bfloat16' is autocast over float32 masters; 'auto' is that where the draft is bfloat16 and the device computes it natively, "
        "else float32.",
    )
    seed: int | None = option(
        None,
        whole(0).or_none(),
        "Seeds the learner's own draws. The global random state of the process is never touched.",
    )


@dataclass
class OnlineConfig(RunningConfig, LearningConfig, FeedbackConfig, DraftingConfig):  # fields come from the last one on
    """Configuration of an [`OnlineAssistant`]: fields in four parts, all of them given here by name.

    Each field's `metadata["help"]` says what it does and which values it takes; so do docs/usage.md and the recipes' `--help`.

    Raises:
        ValueError: for a value out of range, naming the field, the value and the mend; for a field that there is no more.
    """

    def __new__(cls, *args, **values):
        check_removed(values)
        return super().__new__(cls)

    def __post_init__(self):
        check_options(self)

    @property
    def learns(self) -> bool:
        """Whether anything is captured and learnt."""
        return self.learn != "off"

    @property
    def passes(self) -> float:
        """How often a request is learnt, on average, replay included."""
        return 1 + self.replay_ratio

    @property
    def requests_an_update(self) -> int:
        """Requests learnt in an update of `update_interval` new ones, replay included."""
        return round(self.update_interval * self.passes)

    def share_of_time(self, learn: str) -> float:
        """`learning_budget`, or what it is where it is left out."""
        return self.learning_budget or (1 / 3 if learn == "inline" else 0.1)

    @classmethod
    def paper(cls, **overrides) -> OnlineConfig:
        """Algorithm 1 of Online Speculative Decoding (arXiv 2310.07177, section 4.2): γ=5, I=8, forward KL at the error
        positions, lr 1e-4, one optimizer step an update, and no request learnt twice."""
        preset = {
            "num_assistant_tokens": 5,
            "lookahead": "constant",
            "update_interval": 8,
            "positions": "error",
            "prompt_positions": 0,
            "divergence": "forward_kl",
            "total_variation_weight": 0.0,
            "replay_ratio": 0.0,
            "batch_size": None,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "ema_decay": 0.0,
            "sampled_columns": None,
            "gate": False,
        }
        return cls(**{**preset, **overrides})

    @classmethod
    def from_dict(cls, values: dict) -> OnlineConfig:
        """The config of a dict, an older one too whose removed keys asked for what is done now.

        Raises:
            ValueError: for a key it does not know, or no longer; the message names it.
        """
        values = {key: value for key, value in values.items() if key not in REMOVED or value not in REMOVED[key][0]}
        values = {RENAMED.get(key, key): value for key, value in values.items()}
        check_removed(values)
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(
                f"OnlineConfig has no key {', '.join(map(repr, unknown))}. Its keys: {', '.join(sorted(known))}."
            )
        return cls(**values)

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def save_pretrained(self, directory: str | os.PathLike):
        """Write `osd_config.json` into `directory`."""
        os.makedirs(directory, exist_ok=True)
        with open(os.path.join(directory, CONFIG_NAME), "w", encoding="utf-8") as file:
            file.write(dumps(self.to_dict(), indent=2, exact=True) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> OnlineConfig:
        """Read a file written by `save_pretrained`.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it is not JSON, or has a key or value that does not fit.
        """
        with open(path, "rb") as file:
            try:
                values = loads(file.read())
            except ValueError as error:  # of the encoding or of the JSON
                raise ValueError(f"{path} is not valid JSON ({error}); save the config again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no JSON object; save the config again.")
        return cls.from_dict(values)


OnlineConfig.__doc__ = f"{OnlineConfig.__doc__}\n" + "".join(
    f"    {field.name} (`{field.type}`, defaults to `{field.default!r}`):\n        {field.metadata['help']}\n"
    for field in dataclasses.fields(OnlineConfig)
)


def check_removed(names: Iterable[str]):
    """None of the names is a field that there was.

    Raises:
        ValueError: if one is; the message says what to do in its place.
    """
    names = set(names)
    if renamed := sorted(RENAMED.keys() & names):
        raise ValueError(" ".join(f"`{name}` is called `{RENAMED[name]}` now." for name in renamed))
    if gone := sorted(REMOVED.keys() & names):
        raise ValueError(" ".join(f"`{name}` is no field any more: {REMOVED[name][1]}." for name in gone))
