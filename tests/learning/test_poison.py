"""Streams that are poisoned, after good traffic, before it, and among it: what a draft has learnt from poison may not cost the rest of the traffic. Learning is
fast here and nothing is replayed, so that nothing but the gate stands in the way."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig, record_answers
from hf_osd.distill.ensemble import make_student
from hf_osd.distill.scoring import score
from hf_osd.learning.learner import Learner

MARGIN = 0.06  # α of the static draft on 40 prompts, less chance
MOST = 16  # requests that anything poisoned may serve
GOOD, POISON, TOKENS, INTERVAL = 160, 160, 24, 8


class World:
    """Two targets that disagree, a draft that agrees with one of them on some tokens, and streams of recorded answers."""

    def __init__(self, tiny_llama, noised_copy):
        self.target, other = tiny_llama(eos_token_id=None), tiny_llama(seed=5, eos_token_id=None)
        self.random = torch.Generator().manual_seed(1)
        self.drafts = {"brought": noised_copy(self.target, 0.1), "cold": tiny_llama(layers=1, seed=9)}
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

    def run(self, stream: list, draft: str = "brought", **settings) -> list[float]:
        """α on the good prompts that are held back, less that of the static draft, of what served each request."""
        draft = copy.deepcopy(self.drafts[draft])
        trainable = {name for name, _ in draft.named_parameters() if "layers" in name}
        config = OnlineConfig(
            learning_rate=1e-2, replay_ratio=0.0, ema_decay=0.0, warmup_steps=0, batch_size=None, sampled_columns=None,
            update_interval=INTERVAL, seed=0, **settings,
        )  # fmt: skip
        served = copy.deepcopy(draft)
        static = now = self._alpha(served)
        went_out: list = []
        learner = Learner(make_student(draft, trainable, config), FeedbackBuffer(), went_out.append)
        differences = []
        for request in stream:
            differences.append(now - static)
            learner.add(replace(request))
            if learner.is_due() and learner.update():
                served.load_state_dict(went_out[-1], strict=False)
                now = self._alpha(served)
        assert learner.failed == 0
        return differences

    def _alpha(self, draft) -> float:
        return float(torch.cat(score(draft, self.held_back, batch_size=len(self.held_back))).mean())


@pytest.fixture(scope="module")
def world(tiny_llama, noised_copy):
    return World(tiny_llama, noised_copy)


def longest_below(differences: list[float]) -> int:
    """Requests in a row that a draft serves which is worse than the static one."""
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
def test_after_good_traffic_it_serves_next_to_none_of_it(world, poison):
    """Requests of before say that it has unlearnt them."""
    differences = world.run([*world.good, *world.poisons[poison]])
    assert longest_below(differences) <= MOST
    assert differences[-1] >= -MARGIN


@pytest.mark.parametrize("draft", ["brought", "cold"])
@pytest.mark.parametrize("poison", POISONS)
def test_from_the_first_request_on_it_serves_next_to_none_of_the_good_traffic_that_follows(world, poison, draft):
    """There is no other traffic by which it could be known; the first good requests say so."""
    differences = world.run([*world.poisons[poison][:64], *world.good], draft)
    assert longest_below(differences[64:]) <= MOST
    assert differences[-1] >= -MARGIN


@pytest.mark.parametrize("draft", ["brought", "cold"])
@pytest.mark.parametrize("poison", POISONS)
def test_among_good_traffic_it_serves_next_to_none_of_it(world, poison, draft):
    mixed = itertools.chain.from_iterable(zip(world.good, world.poisons[poison], strict=True))
    differences = world.run(list(mixed), draft)
    assert longest_below(differences) <= MOST


@pytest.mark.parametrize("poison", POISONS[1:])
def test_without_the_gate_it_harms_all_that_follows(world, poison):
    """Garbage prompts do not: what the target says there is what it says."""
    differences = world.run([*world.good, *world.poisons[poison]], gate=False)
    assert longest_below(differences) > MOST
    assert differences[-1] < -MARGIN
