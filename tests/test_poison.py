"""A stream that is poisoned: what a draft has learnt from it may cost the rest of the traffic no more than one interval between two full checks of the
gate. Learning is fast here and nothing is replayed, so that nothing but the gate stands in the way."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig, record_answers
from hf_osd import gate as gate_module
from hf_osd.gate import Gate
from hf_osd.learner import Learner
from hf_osd.scoring import score

INTERVAL = 10  # updates between two full checks: in so short a stream learning pays for none
MARGIN = 0.06  # α of the static draft on 40 prompts, less chance
GOOD, POISON, TOKENS = 200, 280, 24


class World:
    """Two targets that disagree, a draft that agrees with one of them on some tokens, and streams of recorded answers."""

    def __init__(self, tiny_llama, noised_copy):
        self.target, other = tiny_llama(eos_token_id=None), tiny_llama(seed=5, eos_token_id=None)
        self.draft, self.random = noised_copy(self.target, 0.1), torch.Generator().manual_seed(1)
        starts = self._draw(4, 4)
        good = [torch.cat([starts[i % 4], self._draw(2)]) for i in range(GOOD + 40)]
        garbage = [self._draw(6) for _ in range(POISON)]
        self.good, self.held_back = self._answers(self.target, good[:GOOD]), self._answers(self.target, good[GOOD:])
        self.poisons = {
            "garbage prompts": self._answers(self.target, garbage),
            "one prompt over and over": self._answers(self.target, garbage[:1]) * POISON,
            "another target's answers": self._answers(other, garbage),
            "another target's answers to the same prompts": self._answers(other, (good * 2)[:POISON]),
        }

    def _draw(self, *size):
        return torch.randint(2, 64, size, generator=self.random)

    def _answers(self, target, prompts):
        return record_answers(target, prompts, TOKENS, batch_size=len(prompts), top_k=16)

    def run(self, poison: str) -> list[float]:
        """α on the good stream's held-back prompts, less that of the static draft, after each update of the poisoned part."""
        draft = copy.deepcopy(self.draft)
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        config = OnlineConfig(
            learning_rate=1e-2, replay=0.0, averaging=0.0, warmup_steps=0, batch_size=None, tail_samples=None,
            held_back_share=0.125, seed=0,
        )  # fmt: skip
        judged = copy.deepcopy(draft)
        static, served = self._alpha(judged), []
        learner = Learner(draft, trainable, FeedbackBuffer(), config, served.append)
        differences = []
        for i, request in enumerate([*self.good, *self.poisons[poison]]):
            learner.offer(replace(request))
            if learner.due():
                learner.update()
                if i >= GOOD:
                    judged.load_state_dict(learner.ensemble.serving_weights(), strict=False)
                    differences.append(self._alpha(judged) - static)
        assert learner.failed == 0
        return differences

    def _alpha(self, draft) -> float:
        return float(torch.cat(score(draft, self.held_back, batch_size=len(self.held_back))).mean())


@pytest.fixture(scope="module")
def world(tiny_llama, noised_copy):
    return World(tiny_llama, noised_copy)


def longest_below(differences: list[float]) -> int:
    """Updates in a row after which the draft that serves is worse than the static one."""
    return max(
        (len(list(run)) for below, run in itertools.groupby(d < -MARGIN for d in differences) if below), default=0
    )


POISONS = [
    "garbage prompts",
    "one prompt over and over",
    "another target's answers",
    "another target's answers to the same prompts",
]


@pytest.mark.parametrize("poison", POISONS)
def test_it_harms_the_rest_for_one_interval_at_most(world, monkeypatch, poison):
    monkeypatch.setattr(gate_module, "_INTERVAL", INTERVAL)
    differences = world.run(poison)
    assert longest_below(differences) <= INTERVAL
    assert differences[-1] >= -MARGIN


@pytest.mark.parametrize("poison", POISONS[1:])
def test_and_does_without_the_gate(world, monkeypatch, poison):
    """Garbage prompts do not: what the target says there is what it says."""
    monkeypatch.setattr(Gate, "check", lambda *args: None)
    differences = world.run(poison)
    assert longest_below(differences) > INTERVAL
    assert differences[-1] < -MARGIN
