"""`OnlineConfig` holds every option of hf_osd in one validated dataclass, which is saved beside the draft's weights."""

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
# Removed fields: the values that ask for what is now always done, which a saved config may have, and the advice for any other value.
_BY_REQUESTS = "an update is due after `update_interval` requests; set that, or call `update()` or `flush()`"
_OWN_ARGS = "leave it out, or train with `OnlineGKDTrainer(args=...)`"
REMOVED = {
    "assistant_confidence_threshold": ([0.0], "`lookahead='cost'` stops where the draft is not sure enough to pay"),
    "clear_after_update": (
        [False, True],
        "`replay_ratio` decides how many past requests are learnt again; set `replay_ratio=0`",
    ),
    "draft_head_rank": ([64], "it is 64; leave it out"),
    "ensemble_sharpness": ([10.0], "it is 10; leave it out"),
    "held_back_share": ([0.0625], "every request is scored before it is learnt, and none is held back; leave it out"),
    "learner_threads": ([1], "a process that learns has one thread; leave it out"),
    "max_grad_norm": ([1.0], f"gradients are clipped to a norm of 1; {_OWN_ARGS}"),
    "optim": (["adamw_torch_fused", "adamw_torch"], f"the optimizer is AdamW, and Muon is gone; {_OWN_ARGS}"),
    "replay_by": (["uniform"], "past requests are drawn uniformly; leave it out"),
    "suffix_cache_tokens": ([16], "it is 16; leave it out"),
    "update_age": ([None], _BY_REQUESTS),
    "update_tokens": ([None], _BY_REQUESTS),
    "weight_decay": ([0.0], f"weights do not decay; {_OWN_ARGS}"),
}
# Renamed fields, under whose old names a saved config still loads.
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
    """Choose what is drafted, and how much."""

    num_assistant_tokens: int = option(
        5, whole(1), "γ, the number of tokens drafted in a round; the upper bound where `lookahead` chooses."
    )
    lookahead: str = option(
        "cost",
        choice("cost", "heuristic", "constant"),
        "How γ is chosen. 'cost' maximises expected tokens over expected time, by the draft's confidence and what the suffix cache proposes, and drafts "
        "nothing while that is below plain decoding; 'heuristic' is transformers' rule (+2 when all is accepted, else -1, at least 1); 'constant' always "
        "drafts `num_assistant_tokens`. The last two use the draft model alone, if there is one.",
    )
    draft_cost: float | None = option(
        None,
        above_zero().or_none(),
        "c, the time of one draft step divided by that of a one-token target step. None measures it while serving; a fixed value makes γ, and so a seeded "
        "run, independent of the clock.",
    )
    verify_cost: float = option(
        0.0,
        number(0),
        "With `draft_cost` given: v(n) = 1 + verify_cost·(n-1), the time of verifying n tokens divided by that of one.",
    )
    verify_target: bool = option(
        True,
        switch(),
        "Check in a few short forwards before the first block, once for each target, configuration and kind of cache, that the target predicts the same for "
        "several tokens at once as for one at a time. A target that fails decodes plainly. False skips the check and relies on what the cache declares.",
    )
    suffix_cache: bool = option(
        True,
        switch(),
        "Draft from recent verified text too, prompts included. This needs no draft model and learns at once; the text is kept in memory, separately for each "
        "tenant.",
    )
    suffix_cache_bytes: int = option(
        64 * 2**20, whole(1), "Bound on the size of the suffix cache, over all tenants. The oldest text goes first."
    )
    draft_head: str = option(
        "auto",
        choice("auto", "full", "traffic", "low_rank"),
        "Which rows of the draft's LM head are computed. 'full': all; 'traffic': those of the tokens that recent traffic used, and of the prompt's; "
        "'low_rank': at each step those whose logits a low-rank projection finds largest; 'auto': 'traffic' where the head has at least four times "
        "`draft_vocab_size` rows, else 'full'. The output stays exact: a token outside these rows is not drafted.",
    )
    draft_vocab_size: int | None = option(
        None,
        whole(1).or_none(),
        "How many rows `draft_head` computes, besides the prompt's; 'low_rank' computes an eighth as many. None: 8,192, but 4,096 where 8,192 would be more "
        "than half as large as the draft's layers.",
    )


@dataclass
class FeedbackConfig:
    """Choose what is kept of a call, and for how long."""

    top_k: int = option(
        64, whole(1), "How many of the target's log-probs are kept at each position; the rest is one tail bucket."
    )
    feedback_dtype: str = option(
        "float16", choice("float16", "bfloat16", "float32"), "Dtype in which these log-probs are stored."
    )
    positions: str = option(
        "all",
        choice("all", "error"),
        "Verified positions to learn from: 'all' of them or, as in the paper, only the 'error' position that ends each round.",
    )
    prompt_positions: int = option(
        256,
        whole(0),
        "Largest number of positions, the last ones of a prompt, to learn from as well. The target's predictions there cost its LM head and no forward. "
        "The beginning that a prompt shares with a recent one is learnt once. 0 learns from answers alone.",
    )
    buffer_bytes: int | None = option(
        None,
        whole(1).or_none(),
        "Bound on the feedback kept in memory. The oldest goes first. None is 64 MiB; for a draft that reads the target's hidden states as much more as 131,072 "
        "of these take, but no more than an eighth of the memory that is free when the assistant is made.",
    )
    buffer_age: float | None = option(
        None, above_zero().or_none(), "Seconds after which feedback is dropped. None keeps it."
    )


@dataclass
class LearningConfig:
    """Choose how to learn, and which updates may serve."""

    update_interval: int = option(8, whole(1), "I in the paper: an update is due after this many requests.")
    replay_ratio: float = option(
        6.0, number(0), "Past requests, drawn uniformly from the buffer, that an update replays for each new one."
    )
    batch_size: int | None = option(
        2, whole(1).or_none(), "Requests in an optimizer step. None puts the whole update into one step."
    )
    learning_rate: str = option(  # or a number; flags know one type
        "auto",
        Bound(
            "give a number above 0, or 'auto'",
            lambda value: value == "auto" or (is_number(value) and 0 < value < math.inf),
            as_number,
        ),
        "'auto' tries a few rates on the first requests, each with one pass and with as many as replay makes, and goes on with the one that did best on the "
        "next requests; it lowers the rate where an update made the draft worse, and raises it again where one made it better. A number is used as it is.",
    )
    warmup_steps: int = option(
        10, whole(0), "Optimizer steps over which the learning rate rises to its value; once, not once an update."
    )
    decay_steps: int | None = option(
        None,
        whole(1).or_none(),
        "After the warm-up the learning rate falls as 1/√(1 + steps since / decay_steps). None keeps it constant.",
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
        "Sampled softmax: how many columns of the LM head, drawn at each optimizer step, estimate the loss over all those outside the targets' top k. The "
        "gradient is then an estimate, and the head no longer most of the work. None computes all columns; so does a draft whose head has few.",
    )
    unrolled_steps: int = option(
        3,
        whole(1),
        "Of a draft that reads the target's hidden states: drafted tokens in a row that it learns for, reading its own states where the target's are not known "
        "yet. Each takes about as long as learning without. Other drafts learn as if it were 1.",
    )
    state_loss_weight: float = option(
        30.0,
        number(0),
        "Of a draft that reads the target's hidden states and has its LM head: weight of a loss that draws its own last state towards the target's (EAGLE's "
        "regression, arXiv 2401.15077), which from a few hundred requests teaches more than the predictions alone. 0 leaves it out.",
    )
    freeze_embeddings: bool = option(
        True, switch(), "Do not train input embeddings and LM head. They are then shared by all copies of the draft."
    )
    adapter: str = option(
        "auto",
        choice("auto", "lora", "off", true="lora", false="off"),
        "What is trained in a draft that comes without an adapter. 'off': all weights; 'lora': a LoRA adapter over frozen weights; 'auto': all weights where "
        "that takes at most a fifth of the free memory, and 4 GiB, else the adapter. It serves merged into the weights.",
    )
    lora: int = option(16, whole(1), "Rank of that adapter; halved until learning fits into memory.")
    gate: bool = option(
        True,
        switch(),
        "Let an update serve only once later requests, scored before they are learnt, show that it is better, or no worse. False serves every update at "
        "once, as in the paper.",
    )
    gate_tolerance: float = option(
        0.01,
        number(0),
        "How much lower α may be for 'no worse'. 1 lets through all that is not found to be worse.",
    )
    optimism: float = option(
        0.0,
        number(0),
        "Multiple of the last optimizer step that is added to the weights that serve, as if the next gradient were equal to the last (optimistic online "
        "learning, arXiv 2603.12617).",
    )
    ensemble: list[float] | None = option(  # noqa: RUF009 (its default is None)
        None,
        Bound("give a list of numbers above 0, such as [1, 2, 4]", _are_factors, _as_list).or_none(),
        "Learn at several rates at once, these multiples of `learning_rate`, and serve an average of the weights (the same paper). Each rate's share is ∝ "
        "exp(-10 · its loss so far), the loss being the mean rejection rate on the new requests of each update. n rates take n times as long to learn.",
    )


@dataclass
class RunningConfig:
    """Choose where and when learning runs, and what it may use."""

    learn: str = option(
        "inline",
        choice("inline", "background", "process", "off", true="inline", false="off"),
        "Where updates run. 'inline' (or True): between requests, in the thread that serves; 'background': in a thread beside it; 'process': in a process of "
        "its own, which disturbs serving on a CPU less; 'off' (or False): nowhere. Then nothing is recorded, and the draft serves as it is.",
    )
    learning_budget: float | None = option(
        None,
        above_zero("give a share above 0 up to 1", maximum=1).or_none(),
        "Share of the time that learning may use; None is a third inline, else a tenth. Inline it is a share of all the time that calls and learning take "
        "together, and an update learns as much as fits. Beside serving it is a share of the time in which a call is served, and learning may use all of "
        "the time in between: wall time in the background; in a process the time of one core, which at its low priority may stretch over much more.",
    )
    learning_window: int | None = option(
        1024,
        whole(1).or_none(),
        "Largest number of tokens of a request that are read to score and to learn it. Of a longer text these are its first tokens and the part with the most "
        "positions to learn from, with the text before it. None reads all of it, however long that takes.",
    )
    memory_budget: int | None = option(
        None,
        whole(1).or_none(),
        "Bytes that learning may use, by estimate; None is half of what is free when the assistant is made. Where nothing fits, learning is off, and a "
        "warning reports it.",
    )
    learner_device: str | None = option(
        None,
        Bound("give a device's name, such as 'cuda:1'", lambda value: isinstance(value, str)).or_none(),
        "Device to learn on; None is the draft's.",
    )
    learner_dtype: str = option(
        "auto",
        choice("auto", "float32", "bfloat16"),
        "Arithmetic of learning: 'bfloat16' is autocast over float32 masters; 'auto' uses it where the draft is bfloat16 and the device computes faster "
        "in it, else float32.",
    )
    seed: int | None = option(
        None,
        whole(0).or_none(),
        "Seed of the learner's own random draws. The global random state of the process is never touched.",
    )


@dataclass
class OnlineConfig(RunningConfig, LearningConfig, FeedbackConfig, DraftingConfig):  # fields come from the last one on
    """Configures an [`OnlineAssistant`]. Its fields come in four parts; give any of them by name.

    Each field's `metadata["help"]` describes what it does and which values it takes; docs/usage.md and the recipes' `--help` show the same text.

    Raises:
        ValueError: for a value out of range, naming the field, the value and the remedy; for a field that was removed or renamed.
    """

    def __new__(cls, *args, **values):
        check_removed(values)
        return super().__new__(cls)

    def __post_init__(self):
        check_options(self)

    @property
    def learns(self) -> bool:
        """Tell whether anything is recorded and learnt."""
        return self.learn != "off"

    @property
    def passes(self) -> float:
        """Count how often a request is learnt on average, replay included."""
        return 1 + self.replay_ratio

    @property
    def requests_an_update(self) -> int:
        """Count the requests learnt in an update of `update_interval` new ones, replay included."""
        return round(self.update_interval * self.passes)

    def share_of_time(self, learn: str) -> float:
        """Return `learning_budget`, or its default for this `learn`."""
        return self.learning_budget or (1 / 3 if learn == "inline" else 0.1)

    @classmethod
    def paper(cls, **overrides) -> OnlineConfig:
        """Configure Algorithm 1 of Online Speculative Decoding (arXiv 2310.07177, section 4.2): γ=5, I=8, forward KL at the error
        positions, lr 1e-4, one optimizer step an update, and no request learnt twice. `overrides` are fields to change."""
        preset = {
            "num_assistant_tokens": 5,
            "lookahead": "constant",
            "update_interval": 8,
            "positions": "error",
            "prompt_positions": 0,
            "divergence": "forward_kl",
            "total_variation_weight": 0.0,
            "state_loss_weight": 0.0,
            "unrolled_steps": 1,
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
    def of(cls, config: OnlineConfig | None, overrides: dict) -> OnlineConfig:
        """Return a config, the defaults if there is none, with single fields replaced by their names.

        Raises:
            ValueError: as for `from_dict`.
        """
        config = config or cls()
        return cls.from_dict({**config.to_dict(), **overrides}) if overrides else config

    @classmethod
    def from_dict(cls, values: dict) -> OnlineConfig:
        """Make a config of the dict that `to_dict` returns.

        Keys of older versions load too: renamed ones, and removed ones whose value asks for what is now always done.

        Raises:
            ValueError: for an unknown or a removed key, which the message names; for a value out of range.
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
        """Return all fields by name, as a dict that shares nothing with this config."""
        return dataclasses.asdict(self)

    def save_pretrained(self, directory: str | os.PathLike):
        """Write `osd_config.json` into `directory`, which is made if need be. `OSError` if it cannot be written."""
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
            except ValueError as error:  # in the encoding or in the JSON
                raise ValueError(f"{path} is not valid JSON ({error}); save the config again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds no JSON object; save the config again.")
        return cls.from_dict(values)


OnlineConfig.__doc__ = f"{OnlineConfig.__doc__}\n" + "".join(
    f"    {field.name} (`{field.type}`, defaults to `{field.default!r}`):\n        {field.metadata['help']}\n"
    for field in dataclasses.fields(OnlineConfig)
)


def check_removed(names: Iterable[str]):
    """Refuse names of fields that were removed or renamed.

    Raises:
        ValueError: if there is one; the message names what to do instead.
    """
    names = set(names)
    if renamed := sorted(RENAMED.keys() & names):
        raise ValueError(" ".join(f"`{name}` is called `{RENAMED[name]}` now." for name in renamed))
    if gone := sorted(REMOVED.keys() & names):
        raise ValueError(" ".join(f"`{name}` is no field any more: {REMOVED[name][1]}." for name in gone))
