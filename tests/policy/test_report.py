"""`report()`: figures that were observed, and words for what to do in each case."""

from types import SimpleNamespace

import pytest
import torch

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.metrics.intervals import Comparison, Estimate
from hf_osd.metrics.stats import CallStats, Stats
from hf_osd.policy.lookahead import DraftPolicy
from hf_osd.policy.report import report


def served(lookahead: DraftPolicy, rounds: list[tuple[int, int]], target_ms=10.0, draft_ms=1.0, **call) -> Stats:
    """Rounds of (drafted, accepted), told to both."""
    stats, total = Stats(), CallStats(requests=1, **call)
    for drafted, accepted in rounds:
        tested = min(drafted, accepted + 1)
        lookahead.observe_round(drafted, tested, accepted, draft_ms * drafted / 1e3, target_ms / 1e3)
        total.observe_round(drafted, tested, accepted, accepted + 1)
        total.target_seconds += target_ms / 1e3
        total.draft_seconds += draft_ms * drafted / 1e3
    total.overlap_sum, total.overlap_count = sum(a for _, a in rounds), max(sum(d for d, _ in rounds), 1)
    stats.observe_call(total)
    return stats


PLAIN = [(0, 0)] * 4


def test_nothing_served_is_reported():
    assert "Nothing was served yet" in report(Stats(), DraftPolicy("cost", 3))


def test_costs_that_are_not_known_yet_are_not_made_up():
    text = report(served(DraftPolicy("cost", 3), [(0, 0)]), DraftPolicy("cost", 3))
    assert "not known yet" in text


def test_a_draft_that_pays():
    lookahead = DraftPolicy("cost", 3)
    text = report(served(lookahead, [*PLAIN, *[(2, 2)] * 60]), lookahead)
    assert "c = 0.10" in text
    assert "one-token target step: 10.0 ms" in text
    assert "Best fixed γ: 3" in text
    assert "try num_assistant_tokens=6" in text
    assert "The draft drafted 120 tokens, of which 120 were accepted: 65%" in text
    # 184 tokens in 64 steps of 10 ms and 120 of 1 ms.
    assert "observed 2.42×" in text
    assert "2.42× expected" in text


def test_a_draft_that_does_not_pay_gets_its_break_even_point():
    lookahead = DraftPolicy("cost", 3)
    text = report(served(lookahead, [*PLAIN, *[(1, 0)] * 60], draft_ms=4.0), lookahead)
    assert "Drafting pays from α = 0.40 on, so the target decodes plainly" in text
    assert "Best fixed γ" not in text


def test_costs_at_which_no_draft_can_pay():
    lookahead = DraftPolicy("cost", 3)
    text = report(served(lookahead, [*PLAIN, *[(1, 0)] * 60], draft_ms=40.0), lookahead)
    assert "No draft pays at these costs" in text
    assert "smaller draft than c = 4.00" in text


def test_a_head_that_costs_acceptance_is_named():
    lookahead = DraftPolicy("cost", 3)
    stats = served(lookahead, [*PLAIN, *[(2, 1)] * 60], head_tokens=200, head_lacked=30, head_missed=12)
    assert "cost 0.100 of α: try more draft_vocab_size" in report(stats, lookahead)


def test_updates_are_reported():
    lookahead = DraftPolicy("cost", 3)
    stats = served(lookahead, [*PLAIN, *[(2, 1)] * 60])
    assert "updates" not in report(stats, lookahead)
    stats.updates, stats.rejected_updates, stats.failed_updates, stats.accepted_updates = 5, 2, 1, 3
    stats.longest_update = 1.25
    text = report(stats, lookahead)
    assert "5 updates, 1 more failed; what they learnt was let through to serve 3 times and dropped 2 times" in text
    assert "The longest took 1.2 s" in text
    assert "draft as it was before any learning serves" not in text
    stats.serves_static = True
    assert "The draft as it was before any learning serves: on what comes now it is better." in report(
        stats, lookahead
    )


def test_the_gain_of_learning_is_reported_with_rate_and_interval():
    lookahead = DraftPolicy("cost", 3)
    stats = served(lookahead, [*PLAIN, *[(2, 1)] * 60])
    assert "without learning" not in report(stats, lookahead)
    stats.estimate = Estimate(0.61, 0.5, 0.7, 9, Comparison(9, 0.42, 0.61, 0.19, 0.1, 0.3))
    stats.regret_vs_static = -0.25
    stats.learning_rate, stats.learning_rate_reason = 2e-4, "the best of 9 tried"
    text = report(stats, lookahead)
    assert "On the last 9 requests, each before it was learnt, the draft had α = 0.61 (0.50 to 0.70)" in text
    assert "without learning it would have had 0.42: +0.19 (+0.10 to +0.30)" in text
    assert "learning has gained 25.0% of the tokens accepted (regret_vs_static -0.2500)" in text
    assert "Learning rate 2.0e-04: the best of 9 tried." in text
    stats.regret_vs_static = 0.125
    assert "learning has cost 12.5% of the tokens accepted" in report(stats, lookahead)


def test_a_machine_that_is_too_slow_to_learn_gets_advice():
    lookahead = DraftPolicy("cost", 3)
    stats = served(lookahead, [*PLAIN, *[(2, 1)] * 60])
    assert "too slow" not in report(stats, lookahead)
    stats.too_slow = "learning takes 9 ms a token here"
    text = report(stats, lookahead)
    assert "too slow to learn this draft, and serves it as it is: learning takes 9 ms a token here" in text
    assert "learning_budget" in text
    assert "learn='background'" in text


@pytest.mark.parametrize("draft", [True, False])
def test_of_an_assistant_that_served(tiny_llama, noised_copy, draft):
    target = tiny_llama(layers=3)
    assistant = OnlineAssistant(noised_copy(target, 0.2) if draft else None, draft_cost=0.1)
    prompt = torch.tensor([[5, 9, 5, 9, 5, 9, 5]])
    for _ in range(3):
        target.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, assistant_model=assistant)
    text = assistant.report()
    assert ("A draft step" in text) == draft
    assert "The suffix cache drafted" in text
    assert text.count("\n") < 11, "a few lines"
    assert ("Beside the suffix cache alone" in text) == draft


def test_the_longest_wait_is_that_of_a_call_at_its_beginning(target, monkeypatch):

    assistant, seconds = OnlineAssistant(grow_draft(target), learning_rate=1e-3, update_interval=2), [0.0, 3.0, 1.0]
    clock = [0.0]
    monkeypatch.setattr("hf_osd.assistant.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    update = assistant.update

    def waits():
        clock[0] += seconds.pop(0)
        return update()

    monkeypatch.setattr(assistant, "update", waits)
    for _ in range(3):
        target.generate(torch.tensor([[5, 9, 17, 3]]), assistant_model=assistant, max_new_tokens=6, pad_token_id=0)
    monkeypatch.undo()
    assert assistant.stats.longest_wait == pytest.approx(3.0)
    assistant.flush()
    assert "No call waited longer than 3.0 s for learning." in assistant.report()
    assert assistant.stats.to_dict()["longest_wait"] == pytest.approx(3.0)
