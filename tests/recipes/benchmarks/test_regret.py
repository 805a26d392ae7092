"""Simulated rounds against rounds counted by hand and rounds served, and bounds that policies must keep."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd import OnlineAssistant, OnlineConfig, grow_draft, record_answers
from hf_osd.policy.lookahead import DraftPolicy
from recipes.benchmarks.benchmark import predictions_of
from recipes.benchmarks.regret import Driven, Fixed, Predictions, regrets, simulate


def predicted(hits: list[int], sure: float = 0.5) -> Predictions:
    return Predictions(hits, [sure] * len(hits))


def traffic(
    alpha: float, requests: int = 40, tokens: int = 60, calibrated: bool = False, seed: int = 0
) -> list[Predictions]:
    """Requests whose positions are hits with probability `alpha`; with `calibrated`, the draft's confidence says which."""
    draw, traces = random.Random(seed), []
    for _ in range(requests):
        hits = [int(draw.random() < alpha) for _ in range(tokens)]
        traces.append(Predictions(hits, [0.95 if hit else 0.05 for hit in hits] if calibrated else [alpha] * tokens))
    return traces


def test_rounds_are_those_counted_by_hand():
    # γ=2: drafts 1 1 and the bonus token; then 0; then 1, cut by the end, which a length limit gives.
    trace = predicted([1, 1, 0, 0, 1, 1])
    tokens, time = simulate(trace, Fixed(2), 0.25, lambda n: 1 + 0.1 * (n - 1))
    assert tokens == 6
    assert time == pytest.approx((2 * 0.25 + 1.2) + (2 * 0.25 + 1.2) + (0.25 + 1.1))


def test_plain_decoding_is_a_token_a_step():
    assert simulate(predicted([1, 0, 1]), Fixed(0), 0.25, lambda n: 1.0) == (3, 3.0)


@given(
    hits=st.lists(st.integers(0, 1), min_size=1, max_size=40),
    gamma=st.integers(0, 6),
    policy=st.sampled_from(["constant", "heuristic", "cost"]),
)
def test_every_policy_yields_the_whole_answer(hits, gamma, policy):
    driven = Driven(DraftPolicy(policy, max(gamma, 1), 0.2, 0.05))
    for chosen in (Fixed(gamma), driven):
        tokens, time = simulate(predicted(hits), chosen, 0.2, lambda n: 1.0)
        assert tokens == len(hits)
        assert time >= 1


def test_a_driven_constant_is_the_fixed_one():
    def v(n):
        return 1 + 0.05 * (n - 1)

    for trace in traffic(0.7, requests=3):
        assert simulate(trace, Driven(DraftPolicy("constant", 3)), 0.2, v) == simulate(trace, Fixed(3), 0.2, v)


def test_simulated_rounds_are_those_that_serving_makes(tiny_llama):
    """`Driven.choose` repeats the drafting loop's decisions. A draft of all layers is always right, so its confidence is known wherever it is asked."""
    target, costs = tiny_llama(layers=3, eos_token_id=None), {"draft_cost": 0.3, "verify_cost": 0.05}
    draft, random = grow_draft(target, (0, 1, 2)), torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 64, (5,), generator=random) for _ in range(6)]
    answers = record_answers(target, prompts, 20)
    fixed = {"suffix_cache": False, "draft_head": "full", "learn": False}
    assistant = OnlineAssistant(draft, OnlineConfig(num_assistant_tokens=4, **costs, **fixed))
    driven, drafted = Driven(DraftPolicy("cost", 4, *costs.values())), set()
    for prompt, predictions in zip(prompts, predictions_of(draft, answers), strict=True):
        target.generate(
            prompt[None],
            attention_mask=torch.ones(1, 5, dtype=torch.long),
            assistant_model=assistant,
            max_new_tokens=20,
            do_sample=False,
        )
        served = assistant.stats.last
        rounds = sum(count * (1 + 0.05 * (n - 1)) for n, count in served.verified_lengths.items())
        tokens, time = simulate(predictions, driven, 0.3, lambda n: 1 + 0.05 * (n - 1))
        assert (tokens, time) == (served.new_tokens, pytest.approx(served.draft_steps * 0.3 + rounds))
        drafted.add(served.drafted)
    assert len(drafted) > 1, "confidence ended some blocks"


def test_regret_is_beside_the_best_fixed_length():
    found = regrets(traffic(0.8), 4, 0.1, 0.02)
    fixed = {name: row for name, row in found.items() if name.startswith("constant")}
    best = max(row["rate"] for row in fixed.values())
    assert found["constant-0"]["rate"] == 1
    assert all(row["regret"] == pytest.approx(1 - row["rate"] / best) for row in found.values())
    assert min(row["regret"] for row in fixed.values()) == 0


def test_the_cost_policy_stops_where_drafting_does_not_pay():
    found = regrets(traffic(0.05), 5, 0.4, 0.1)
    assert found["constant-0"]["regret"] == 0
    assert found["cost"]["regret"] < 0.05 < found["heuristic"]["regret"]


def test_the_cost_policy_uses_confidence_that_no_fixed_length_can():
    assert regrets(traffic(0.7, calibrated=True), 5, 0.2, 0.1)["cost"]["regret"] < 0


def test_nothing_recorded_is_an_error():
    with pytest.raises(ValueError, match="at least one prompt"):
        regrets([Predictions([], [])], 3, 0.1)
