"""`OnlineConfig`: every choice hf_osd makes, in one validated dataclass that is saved beside the draft's weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass

from hf_osd.system.strict_json import dumps, loads

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "total_variation")
LOOKAHEADS = ("cost", "heuristic", "constant")
HEADS = ("auto", "full", "traffic", "low_rank")
LEARNS = ("inline", "background", "process", "off")
ADAPTERS = ("auto", "lora", "off")
CONFIG_NAME = "osd_config.json"
# Fields of before: the values that asked for what is done now, with which a saved config still loads, and what is to be done with others.
_BY_REQUESTS = "an update is due after `update_interval` requests; set that, or call `update()` or `flush()`"
_OWN_ARGS = "leave it out, or train with `OnlineGKDTrainer(args=...)`"
REMOVED = {
    "assistant_confidence_threshold": ([0.0], "`lookahead='cost'` stops where the draft is not sure enough to pay"),
    "clear_after_update": ([False, True], "what has been learnt is learnt again as `replay` says; set `replay=0`"),
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


@dataclass
class OnlineConfig:
    """Configuration of an [`OnlineAssistant`].

    Args:
        num_assistant_tokens (`int`, defaults to 5):
            γ, the number of tokens drafted a round; the upper bound where `lookahead` chooses.
        lookahead (`str`, defaults to `"cost"`):
            How γ is chosen: `"cost"` maximises expected tokens over expected time, by the draft's confidence and what the
            suffix cache proposes, and drafts nothing while that is below plain decoding; `"heuristic"` is transformers'
            rule (+2 when all is accepted, else -1, at least 1); `"constant"` always drafts `num_assistant_tokens`. These
            two draft with the draft alone, if there is one.
        draft_cost (`float`, *optional*):
            c, the time of one draft step over the time of a one-token target step. Measured while serving if `None`;
            a fixed value makes γ, and so a seeded run, independent of the clock.
        verify_cost (`float`, defaults to 0.0):
            With `draft_cost` given: v(n) = 1 + verify_cost·(n-1), the time of verifying n tokens over that of one.
        suffix_cache (`bool`, defaults to `True`):
            Whether recent verified text, the prompt's included, is a source of drafts too. It needs no draft model and
            learns at once; it is kept in memory, apart by tenant.
        suffix_cache_bytes (`int`, defaults to 64 MiB):
            Bound on what it holds, over all tenants. The oldest text goes first.
        draft_head (`str`, defaults to `"auto"`):
            Which rows of the draft's LM head are computed: `"full"`, all of them; `"traffic"`, those of the tokens that
            the traffic used of late, and the prompt's; `"low_rank"`, at each step those whose logits a low-rank
            projection finds largest; `"auto"`, `"traffic"` where the head has at least four times
            `draft_head_rows` rows, else `"full"`. The output stays exact: a token that is not among them is not drafted.
        draft_head_rows (`int`, defaults to 8192):
            How many rows that is, beside the prompt's; of `"low_rank"`, an eighth of it.
        learn (`str` or `bool`, defaults to `"inline"`):
            When to learn: `"inline"` (or `True`), between requests, in the thread that serves; `"background"`, in a thread beside it; `"process"`, in
            a process of its own, which is kinder to a CPU that serves; `"off"` (or `False`) captures nothing and serves the draft as it is.
        learning_budget (`float`, *optional*):
            The share of the time that learning may take; a third inline, else a tenth, if left out. Inline that is of all the time that calls and learning
            take together, and an update learns as much as fits; beside serving it is of the time in which a call is served, and learning takes all there
            is while none is: in the background time on the wall, in a process that of one core, which at its low priority may stretch over much more.
        learning_window (`int`, *optional*, defaults to 1024):
            Tokens of a request that are read to judge and to learn it, at most. Of a longer text that is where most of it teaches, with what comes before, and its
            first tokens. `None` reads all of it, however long that takes.
        learner_device (`str`, *optional*):
            Where to learn, such as `"cuda:1"`; the draft's device if left out.
        top_k (`int`, defaults to 64):
            How many of the target's log-probs are kept a position; the rest is one tail bucket.
        feedback_dtype (`str`, defaults to `"float16"`):
            Storage of the log-probs: `"float16"`, `"bfloat16"` or `"float32"`.
        buffer_bytes (`int`, defaults to 64 MiB):
            Bound on the feedback kept in memory. The oldest goes first.
        buffer_age (`float`, *optional*):
            Feedback older than this many seconds is dropped. `None` keeps it.
        update_interval (`int`, defaults to 8):
            I in the paper: an update is due after this many requests.
        gate (`bool`, defaults to `True`):
            Whether what was learnt serves only once requests that came since, judged before they are learnt, say that it is better, or no worse. Without
            it all that is learnt serves at once, as in the paper.
        gate_tolerance (`float`, defaults to 0.01):
            By how much α may be lower for "no worse". 1 lets through all that is not found to be worse.
        positions (`str`, defaults to `"all"`):
            `"all"` verified positions teach, or, as in the paper, only the `"error"` position that ends each round.
        prompt_positions (`int`, defaults to 256):
            Positions of a prompt, its last ones, that teach as well, at most: what the target makes of a prompt costs its LM head there and no
            forward. What a prompt shares with one of the last ones teaches once. 0 learns from answers alone.
        divergence (`str`, defaults to `"forward_kl"`):
            `"forward_kl"`, `"reverse_kl"`, `"jsd"` (generalized, with `beta`) or `"total_variation"`.
        beta (`float`, defaults to 0.5):
            Mixture weight of `"jsd"`, in the sense of trl's GKD: M = beta·target + (1-beta)·draft.
        total_variation_weight (`float`, defaults to 1.0):
            Weight of a total variation term added to `divergence` (1 - Σ min(p, q), the rejection rate itself).
        replay (`float`, defaults to 6.0):
            Replayed requests for each new one in an update, drawn uniformly from the buffer.
        batch_size (`int`, *optional*, defaults to 2):
            Requests an optimizer step. `None` puts the whole update into one step.
        learning_rate (`float` or `"auto"`, defaults to `"auto"`):
            `"auto"` tries a few rates, each with one pass and with as many as replay makes, on the first requests, goes on with the one that did best on the
            next, goes lower where what was learnt was worse, and up again where it was better. A number is obeyed.
        warmup_steps (`int`, defaults to 10):
            Optimizer steps in which the learning rate rises to what it is; once, not once an update.
        decay_steps (`int`, *optional*):
            After the warm-up the learning rate falls as 1/√(1 + steps since / decay_steps). `None` keeps it.
        averaging (`float`, defaults to 0.98):
            What serves is an average of the weights over optimizer steps, of which each step keeps this share. 0 serves the weights as they are.
        optimism (`float`, defaults to 0.0):
            What serves is moved on by this many times the last optimizer step, as if the next gradient were the last one (optimistic
            online learning, arXiv 2603.12617).
        ensemble (`list[float]`, *optional*):
            Learn at several rates at once, these multiples of `learning_rate`, and serve the average of the weights, each with a share ∝
            exp(-10 · its loss so far, the mean rejection rate on the new requests of each update) (the same). Learning takes that many times as long.
        tail_samples (`int`, *optional*, defaults to 2048):
            Columns of the LM head drawn, at each optimizer step, to stand for all those outside the targets' top k; the gradient is then an
            estimate, and the head no longer most of the work. `None` computes them all, as does a head of few columns.
        freeze_embeddings (`bool`, defaults to `True`):
            Do not train input embeddings and LM head. They are then shared by all copies of the draft.
        adapter (`str`, defaults to `"auto"`):
            What learns of a draft that comes without an adapter: `"off"`, all weights; `"lora"`, a LoRA adapter over weights that stay as they are;
            `"auto"`, all weights where that takes at most a fifth of the memory there is, and 4 GiB, else the adapter. What serves has the adapter in its weights.
        lora (`int`, defaults to 16):
            The rank of that adapter; it comes down by halves where learning would not fit into memory.
        memory_budget (`int`, *optional*):
            Bytes that learning may take, by estimate; half of what is free when the assistant is made if `None`. Where nothing fits, learning is off, and a
            warning says so.
        learner_dtype (`str`, defaults to `"auto"`):
            Arithmetic of learning: `"float32"`, `"bfloat16"` (autocast over float32 masters), or `"auto"`: bfloat16
            where the draft is bfloat16 and the device computes it natively, else float32.
        seed (`int`, *optional*):
            Seeds the learner's own draws. The global random state of the process is never touched.
        verify_target (`bool`, defaults to `True`):
            Whether to try, once for each target, configuration and kind of cache, that it says of several tokens at once what it says of them one at a
            time, in a few short forwards before the first block. One that does not decodes plainly. Without it a target is taken at its cache's word.

    Raises:
        ValueError: for a value out of range, naming the field, the value and the mend.
    """

    num_assistant_tokens: int = 5
    lookahead: str = "cost"
    draft_cost: float | None = None
    verify_cost: float = 0.0
    suffix_cache: bool = True
    suffix_cache_bytes: int = 64 * 2**20
    draft_head: str = "auto"
    draft_head_rows: int = 8192
    learn: str = "inline"
    learning_budget: float | None = None
    learning_window: int | None = 1024
    learner_device: str | None = None
    top_k: int = 64
    feedback_dtype: str = "float16"
    buffer_bytes: int = 64 * 2**20
    buffer_age: float | None = None
    update_interval: int = 8
    gate: bool = True
    gate_tolerance: float = 0.01
    positions: str = "all"
    prompt_positions: int = 256
    divergence: str = "forward_kl"
    beta: float = 0.5
    total_variation_weight: float = 1.0
    replay: float = 6.0
    batch_size: int | None = 2
    learning_rate: str = "auto"  # or a number; flags know one type
    warmup_steps: int = 10
    decay_steps: int | None = None
    averaging: float = 0.98
    optimism: float = 0.0
    ensemble: list[float] | None = None
    tail_samples: int | None = 2048
    freeze_embeddings: bool = True
    adapter: str = "auto"
    lora: int = 16
    memory_budget: int | None = None
    learner_dtype: str = "auto"
    seed: int | None = None
    verify_target: bool = True

    def __new__(cls, *args, **values):
        check_removed(values)
        return super().__new__(cls)

    def __post_init__(self):
        # As flags, YAML and users write it.
        self.learn = {"true": "inline", "false": "off"}.get(str(self.learn).lower(), self.learn)
        if isinstance(self.gate, str):
            self.gate = {"true": True, "false": False}.get(self.gate.lower(), self.gate)
        self._choice("gate", (True, False))
        if isinstance(self.verify_target, str):
            self.verify_target = {"true": True, "false": False}.get(self.verify_target.lower(), self.verify_target)
        self._choice("verify_target", (True, False))
        self._choice("learn", LEARNS)
        self.adapter = {"true": "lora", "false": "off"}.get(str(self.adapter).lower(), self.adapter)
        self._choice("adapter", ADAPTERS)
        self._at_least("lora", 1, whole=True)
        if self.memory_budget is not None:
            self._at_least("memory_budget", 1, whole=True)
        self._choice("lookahead", LOOKAHEADS)
        self._choice("draft_head", HEADS)
        self._choice("feedback_dtype", ("float16", "bfloat16", "float32"))
        self._choice("positions", ("all", "error"))
        self._choice("divergence", DIVERGENCES)
        self._choice("learner_dtype", ("auto", "float32", "bfloat16"))
        sizes = ("suffix_cache_bytes", "draft_head_rows")
        for name in ("num_assistant_tokens", "top_k", "buffer_bytes", "update_interval", *sizes):
            self._at_least(name, 1, whole=True)
        for name in ("batch_size", "decay_steps", "tail_samples", "learning_window"):
            if getattr(self, name) is not None:
                self._at_least(name, 1, whole=True)
        for name in ("warmup_steps", "prompt_positions"):
            self._at_least(name, 0, whole=True)
        for name in (
            "verify_cost",
            "total_variation_weight",
            "replay",
            "optimism",
            "gate_tolerance",
        ):
            self._at_least(name, 0)
        for name in ("draft_cost", "buffer_age"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"`{name}` is {value!r}; give a number above 0.")
        # As a flag has it, which is text where it may also be a word.
        with contextlib.suppress(ValueError, TypeError):
            self.learning_rate = "auto" if self.learning_rate == "auto" else float(self.learning_rate)
        if self.learning_rate != "auto" and not (_is_number(self.learning_rate) and 0 < self.learning_rate < math.inf):
            raise ValueError(f"`learning_rate` is {self.learning_rate!r}; give a number above 0, or 'auto'.")
        if not (_is_number(self.beta) and 0 <= self.beta <= 1):
            raise ValueError(f"`beta` is {self.beta!r}; give a number from 0 to 1.")
        if self.learning_budget is not None and not (
            _is_number(self.learning_budget) and 0 < self.learning_budget <= 1
        ):
            raise ValueError(f"`learning_budget` is {self.learning_budget!r}; give a share above 0 up to 1, or None.")
        if not (_is_number(self.averaging) and 0 <= self.averaging < 1):
            raise ValueError(f"`averaging` is {self.averaging!r}; give a number from 0 to below 1, such as 0.95.")
        if self.ensemble is not None and not (
            isinstance(self.ensemble, (list, tuple))
            and self.ensemble
            and all(_is_number(factor) and 0 < factor < float("inf") for factor in self.ensemble)
        ):
            raise ValueError(
                f"`ensemble` is {self.ensemble!r}; give a list of numbers above 0, such as [1, 2, 4], or None."
            )
        if self.ensemble is not None:
            self.ensemble = list(self.ensemble)  # as JSON gives it back
        if self.seed is not None:
            self._at_least("seed", 0, whole=True)

    def _choice(self, name: str, allowed: tuple[str, ...]):
        if getattr(self, name) not in allowed:
            raise ValueError(f"`{name}` is {getattr(self, name)!r}; choose one of {', '.join(map(repr, allowed))}.")

    def _at_least(self, name: str, least: int, whole: bool = False):
        value = getattr(self, name)
        if not _is_number(value) or (whole and not isinstance(value, int)) or not value >= least:
            raise ValueError(f"`{name}` is {value!r}; give {'a whole number' if whole else 'a number'} ≥ {least}.")

    @property
    def learns(self) -> bool:
        """Whether anything is captured and learnt."""
        return self.learn != "off"

    @property
    def passes(self) -> float:
        """How often a request is learnt, on average, replay included."""
        return 1 + self.replay

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
            "replay": 0.0,
            "batch_size": None,
            "learning_rate": 1e-4,
            "warmup_steps": 0,
            "averaging": 0.0,
            "tail_samples": None,
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


def check_removed(names: Iterable[str]):
    """None of the names is a field that there was.

    Raises:
        ValueError: if one is; the message says what to do in its place.
    """
    if gone := sorted(REMOVED.keys() & set(names)):
        raise ValueError("; ".join(f"`{name}` is no field any more: {REMOVED[name][1]}" for name in gone) + ".")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
