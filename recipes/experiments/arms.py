"""Arms of an experiment, each a learner's config and a draft to begin with; and confidence intervals of their differences."""

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
    """One setting to try."""

    label: str
    config: OnlineConfig
    draft_name: str  # as in `--draft`

    def draft(self, target: PreTrainedModel, size: int | None = None) -> PreTrainedModel:
        """Load the draft to begin with, a new one for each run.

        Args:
            size: the size of the traces' vocabulary, if that is not the target's.

        Raises:
            ValueError: if the draft has a vocabulary of another size.
        """
        draft = load_draft(self.draft_name, target, any_vocabulary=size is not None)
        if size not in (None, own := draft.config.get_text_config().vocab_size):
            raise ValueError(
                f"The traces are in the tokens of a draft that has {size}, and {self.draft_name} has {own}; give --draft the one that record.py had."
            )
        return draft

    def facts(self) -> dict:
        """Return what makes two arms the same."""
        return {"config": {**self.config.to_dict(), "seed": None}, "draft": self.draft_name}


def read_arm(arm: str, base: OnlineConfig, draft: str) -> Arm:
    """Read an arm such as `"batch_size=2,replay_ratio=3.0"`: changes to the config `base`; `"base"` is `base` itself.

    Keys are the fields of `OnlineConfig`, and `draft=…`, as in `--draft` but with '+' between layers; `preset=paper` for `OnlineConfig.paper()` in place of
    `base`. `lora=8` also sets `adapter=lora`.

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
    """A difference of α and its 95% bootstrap interval."""

    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.difference:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def intervals(before: list[list[list[int]]], after: list[list[list[int]]]) -> Interval:
    """Estimate the difference of α between two arms, by a paired bootstrap over prompts and over seeds.

    Args:
        before, after: for each seed a list with `[hits, positions]` of each prompt; both arms have the same seeds, each with the same order of requests, and
            the same prompts.
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
