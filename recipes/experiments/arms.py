"""Arms of an experiment: a learner's config and the draft it begins with; and how sure their differences are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hf_osd import OnlineConfig
from recipes.common.models import load_draft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESAMPLES = 2000


@dataclass
class Arm:
    """What to learn with."""

    label: str
    config: OnlineConfig
    name: str  # of the draft, as `--draft` has it

    def draft(self, target: PreTrainedModel, size: int | None = None) -> PreTrainedModel:
        """The draft to begin with: of its own for each run.

        Args:
            size: of the vocabulary that the traces are in, where that is not the target's.

        Raises:
            ValueError: if the draft's is another.
        """
        draft = load_draft(self.name, target, any_vocabulary=size is not None)
        if size not in (None, own := draft.config.get_text_config().vocab_size):
            raise ValueError(
                f"The traces are in the tokens of a draft that has {size}, and {self.name} has {own}; give --draft the one that record.py had."
            )
        return draft

    def facts(self) -> dict:
        return {"config": {**self.config.to_dict(), "seed": None}, "draft": self.name}


def read_arm(arm: str, base: OnlineConfig, draft: str) -> Arm:
    """`"batch_size=2,replay_ratio=3.0"` over `base`; `"base"` is that itself.

    Beside the fields of `OnlineConfig`: `draft=…`, as `--draft` has it, but with '+' between layers; `lora=8` alone means `adapter=lora` too;
    `preset=paper`, `OnlineConfig.paper()` in place of the base.

    Raises:
        ValueError: if it is not such a list, or a value does not fit.
    """
    changes, label = {}, arm.strip() or "base"
    for item in filter(None, map(str.strip, "" if label == "base" else arm.split(","))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"`arms` has {item!r}; write field=value, such as batch_size=2.")
        value = value.strip().replace("+", ",")  # a comma ends the field
        try:
            changes[key.strip()] = json.loads(value)
        except json.JSONDecodeError:  # a word, such as forward_kl
            changes[key.strip()] = value
    draft = changes.pop("draft", draft)
    if "lora" in changes:
        changes.setdefault("adapter", "lora")
    preset = changes.pop("preset", None)
    if preset not in (None, "paper"):
        raise ValueError(f"`arms` has preset={preset!r}; the preset is 'paper'.")
    if preset == "paper":
        return Arm(label, OnlineConfig.paper(**changes), draft)
    return Arm(label, OnlineConfig.from_dict({**base.to_dict(), **changes}), draft)


@dataclass(frozen=True)
class Interval:
    """A difference of α, and between what it lies in 95 of 100 resamplings of the prompts."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.difference:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def intervals(before: list[list[list[int]]], after: list[list[list[int]]]) -> Interval:
    """The difference of α between two arms, paired: a bootstrap over prompts, and over seeds, which are the same requests in the same order in both.

    Args:
        before, after: a list a seed, of `[hits, positions]` a prompt; as many seeds, and the same prompts.
    """
    generator = torch.Generator().manual_seed(0)
    arms = [torch.tensor(arm, dtype=torch.float64) for arm in (before, after)]  # (seeds, prompts, 2)
    seeds, prompts = arms[0].shape[:2]
    drawn = torch.randint(prompts, (RESAMPLES, prompts), generator=generator)
    picked = torch.randint(seeds, (RESAMPLES, seeds), generator=generator)
    alphas, means = [], []
    for arm in arms:
        sums = torch.stack([one[drawn].sum(1) for one in arm])  # (seeds, RESAMPLES, 2)
        by_seed = (sums[..., 0] / sums[..., 1].clamp_min(1)).T  # (RESAMPLES, seeds)
        alphas.append(by_seed.gather(1, picked).mean(1))
        whole = arm.sum(1)
        means.append(float((whole[:, 0] / whole[:, 1].clamp_min(1)).mean()))
    low, high = (alphas[1] - alphas[0]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(means[1] - means[0], low, high)
