"""What the draft earns beside the suffix cache alone: the account, and a policy that keeps it."""

from random import Random

import pytest

from hf_osd.policy.earnings import ALLOWANCE, MAX_CREDIT, RENEWED, Earnings
from hf_osd.policy.lookahead import DraftPolicy


def test_a_round_earns_what_its_tokens_would_have_taken_less_its_own_time():
    account = Earnings()
    assert account.ratio is None
    assert account.observe(3.0, 1.5, 2.0, 1.0) == pytest.approx(1.0 / 2.0 - 0.5)  # two tokens a step without it
    assert account.observe(4.0, 1.5, 2.0, 1.0) == pytest.approx(2.0 / 2.0 - 0.5)
    assert account.ratio == pytest.approx(1 + 0.5 / 3.0)


def test_a_draft_that_loses_is_stopped_and_tried_again_now_and_then():
    account, lost = Earnings(), 0.0
    for _ in range(10_000):
        if account.in_credit:
            lost -= account.observe(1.0, 1.3, 1.0, 1.0)
        else:
            account.observe(1.0, 1.0, 1.0, 1.0)
    assert lost < ALLOWANCE + 0.006 * 10_000
    assert lost > ALLOWANCE + 0.003 * 10_000, "it is tried again"


def test_what_was_earned_is_not_kept_for_ever():
    account = Earnings()
    for _ in range(1000):
        account.observe(3.0, 1.2, 1.0, 1.0)
    assert account.credit == MAX_CREDIT
    assert account.ratio > 1.5


def test_a_stall_of_the_machine_does_not_stop_the_draft():
    account = Earnings()
    account.observe(3.0, 500.0, 1.0, 1.0)
    assert account.in_credit


STREAMS = {  # how often each is right: of the cache's tokens, and of the draft's in the first and in the second half
    "the draft is bad": (0.5, 0.05, 0.05),
    "the draft is good": (0.3, 0.8, 0.8),
    "it gets good": (0.4, 0.05, 0.8),
    "it gets bad": (0.4, 0.8, 0.05),
    "the cache is better": (0.9, 0.5, 0.5),
    "nobody is any good": (0.02, 0.02, 0.02),
}


def serve(policy, cached, first, second, rounds=4000, *, told=None):
    """Tokens a step over a stream of rounds; `told` is the confidence that the draft has in its tokens, right or not."""
    random, tokens, time = Random(0), 0, 0.0
    for i in range(rounds):
        right = first if i < rounds // 2 else second
        line = [random.random() < cached for _ in range(8)]
        would = next((j for j, hit in enumerate(line) if not hit), 8)
        proposed, agreement = list(range(8)), [0.6] * 8
        plan = policy.plan(3, agreement)
        steps = max(plan.length, 1) if plan.source == "draft" and plan.length else 0
        if steps:
            hits = [random.random() < right for _ in range(plan.length)]
            accepted = next((j for j, hit in enumerate(hits) if not hit), plan.length)
        else:
            accepted = min(would, plan.length)
        tested = min(accepted + 1, plan.length)
        drafting, target = 0.1 * steps, 1 + 0.02 * plan.length
        verified = [j if j < would else -1 for j in range(accepted + 1)]
        policy.observe_earnings(
            plan,
            verified,
            proposed,
            3,
            agreement,
            drafted=plan.length,
            recorded=0 if steps else tested,
            steps=steps,
            draft_seconds=drafting,
        )
        policy.observe_round(
            plan.length,
            tested,
            accepted,
            drafting,
            target,
            steps=steps,
            unread=1,
            read_seconds=0.1 if steps else None,
            cached=0 if steps else plan.length,
            match=3,
            agreement=[] if steps else agreement,
            confidence=[told] * steps if told and steps else [],
        )
        if not steps:
            policy.observe_untested([float(random.random() < right)], [told] if told else [])
        tokens, time = tokens + accepted + 1, time + drafting + target
    return tokens / time


@pytest.mark.parametrize("told", [None, 0.3, 0.98])
@pytest.mark.parametrize("stream", STREAMS)
def test_with_a_draft_it_is_never_slower_than_the_cache_alone(stream, told):
    alone = serve(DraftPolicy("cost", 5, max_cached=8, has_draft=False), *STREAMS[stream])
    both = serve(DraftPolicy("cost", 5, max_cached=8), *STREAMS[stream], told=told)
    assert both > 0.985 * alone
    if "good" in stream and "nobody" not in stream:
        assert both > 1.1 * alone


def test_a_draft_without_credit_is_not_to_be_asked_until_other_weights_serve():
    policy = DraftPolicy("cost", 5, draft_cost=0.1)
    policy.observe_untested([1.0] * 100)
    assert policy.may_ask_draft
    policy.earnings.observe(1.0, 10.0 * ALLOWANCE, 1.0, 1.0)
    policy.earnings.observe(1.0, 10.0 * ALLOWANCE, 1.0, 1.0)
    assert not policy.may_ask_draft
    policy.note_weights(0)
    assert not policy.may_ask_draft
    policy.note_weights(1)
    assert policy.may_ask_draft
    assert policy.earnings.credit == RENEWED
    policy.earnings.observe(1.0, 10.0 * ALLOWANCE, 1.0, 1.0)
    policy.note_weights(1)
    assert not policy.may_ask_draft
    assert DraftPolicy("constant", 5).may_ask_draft
    assert not DraftPolicy("constant", 5, has_draft=False).may_ask_draft
