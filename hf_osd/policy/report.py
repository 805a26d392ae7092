"""`report` describes the speed that an assistant has observed, in words that a user can act on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hf_osd.policy.lookahead import best_length, break_even

if TYPE_CHECKING:
    from hf_osd.metrics.stats import CallStats, Stats
    from hf_osd.policy.lookahead import DraftPolicy


def report(stats: Stats, lookahead: DraftPolicy, learning: str | None = None) -> str:
    """Describes in a few lines what a draft costs (c, v), how often it is accepted (α), if that pays, what of it learns (`learning`), and what was gained."""
    rolling, costs = stats.rolling, lookahead.costs
    if not stats.total.rounds and not stats.total.plain_requests:
        return "Nothing was served yet: pass this assistant to generate(..., assistant_model=assistant)."
    lines = []
    if plain := stats.total.plain_requests:
        lines.append(
            f"{plain} of {stats.total.requests} requests were decoded plainly, for their target cannot verify a block of drafts; a warning says why."
        )
    if costs.step_seconds is None and not costs.are_fixed:
        lines.append("The cost of a plain step is not known yet: serve a few more tokens.")
    else:
        lines += _costs_lines(lookahead)
        lines += _draft_lines(rolling, lookahead) if lookahead.has_draft else []
    lines += [learning] if learning is not None and lookahead.has_draft else []
    lines += _learning_lines(stats)
    lines += _source_lines(rolling)
    if rolling.refed_tokens:
        lines.append(
            f"The target has recurrent states, and read {rolling.refed_tokens} of {rolling.new_tokens} tokens again, after blocks that were accepted in part."
        )
    lines += _earnings_lines(lookahead)
    lines += _speed_lines(rolling, lookahead)
    return "\n".join(lines)


def observed_speedup(calls: CallStats, lookahead: DraftPolicy) -> float | None:
    """Computes how many times faster than plain decoding these calls were, prompts included in their time; `None` until a plain step was measured."""
    step = lookahead.costs.step_seconds
    return None if step is None or not calls.seconds else calls.new_tokens * step / calls.seconds


def _costs_lines(lookahead: DraftPolicy) -> list[str]:
    costs, longest = lookahead.costs, lookahead.max_gamma + 1
    step = "" if costs.step_seconds is None else f" (one-token target step: {1e3 * costs.step_seconds:.1f} ms)"
    v = ", ".join(f"v({n}) = {value:.2f}" for n, value in enumerate(costs.v_upto(longest), 1) if n in (2, 4, longest))
    lines = [f"Verifying several tokens, in one-token target steps: {v}{step}."]
    if lookahead.has_draft:
        c = "not measured yet" if costs.c is None else f"c = {costs.c:.2f} of one"
        lines.append(f"A draft step: {c}.")
    return lines


def _draft_lines(rolling: CallStats, lookahead: DraftPolicy) -> list[str]:
    c, v, max_gamma = lookahead.costs.c, lookahead.costs.v, lookahead.max_gamma
    if c is None:
        return ["The draft has proposed nothing yet, so its acceptance is not known."]
    first = lookahead.acceptance()[0]
    alpha = (
        f"α = {rolling.alpha:.2f} over the last requests" if not math.isnan(rolling.alpha) else "α is not known yet"
    )
    gamma, expected = best_length([first] * max_gamma, c, v)
    needed = break_even(c, v, max_gamma)
    lines = [f"The draft: {alpha}; its next token is accepted with probability {first:.2f}, of late."]
    if needed is None:
        lines.append(
            f"No draft pays at these costs: even one that is always right would not be faster. Take a smaller draft than c = {c:.2f}, or "
            "hardware on which verifying several tokens costs little more than one."
        )
    elif gamma:
        lines.append(
            f"Drafting pays from α = {needed:.2f} on. Best fixed γ: {gamma}, expected speed-up of the draft alone {expected:.2f}×."
        )
    else:
        lines.append(
            f"Drafting pays from α = {needed:.2f} on, so the target decodes plainly and still teaches the draft. Let it learn from more requests, "
            "or warm it up on prompts like yours; a draft with a cheaper step would pay sooner."
        )
    if gamma == max_gamma and expected > 1.2:
        lines.append(f"The best γ is the largest allowed: try num_assistant_tokens={2 * max_gamma}.")
    if rolling.head_alpha_loss > 0.01:
        lines.append(
            f"The rows that its LM head left out cost {rolling.head_alpha_loss:.3f} of α: try more draft_vocab_size, or draft_head='full'."
        )
    return lines


def _learning_lines(stats: Stats) -> list[str]:
    lines, estimate = [], stats.estimate
    if estimate is not None:
        gain = estimate.gain
        lines.append(
            f"On the last {estimate.requests} requests, each before it was learnt, the draft had α = {estimate.alpha:.2f} ({estimate.low:.2f} to "
            f"{estimate.high:.2f}); without learning it would have had {gain.before:.2f}: {gain.difference:+.2f} ({gain.low:+.2f} to {gain.high:+.2f})."
        )
        lines.append(
            f"Over all requests learning has {'cost' if stats.regret_vs_static > 0 else 'gained'} {abs(stats.regret_vs_static):.1%} of the tokens accepted "
            f"(regret_vs_static {stats.regret_vs_static:+.4f})."
        )
    if stats.learning_rate is not None:
        lines.append(f"Learning rate {stats.learning_rate:.1e}: {stats.learning_rate_reason}.")
    if stats.updates or stats.failed_updates:
        lines.append(
            f"{stats.updates} updates, {stats.failed_updates} more failed; what they learnt was let through to serve {stats.accepted_updates} times and dropped "
            f"{stats.rejected_updates} times. The longest took {stats.longest_update:.1f} s. No call waited longer than {stats.longest_wait:.1f} s for learning."
        )
    if stats.learning_seconds and stats.total.seconds:
        share = stats.learning_seconds / stats.total.seconds
        lines.append(f"Learning has taken {stats.learning_seconds:.1f} s, {share:.0%} of the time of all calls.")
    if stats.trouble:
        lines.append(stats.trouble)
    if stats.serves_static:
        lines.append("The draft as it was before any learning serves: on what comes now it is better.")
    if stats.learning_over:
        lines.append(f"Nothing is learnt any more: {stats.learning_over}.")
    if stats.too_slow:
        lines.append(
            f"This machine is too slow to learn this draft, and serves it as it is: {stats.too_slow}. Raise learning_budget, learn beside serving "
            "(learn='background'), or take a smaller draft."
        )
    return lines


def _source_lines(rolling: CallStats) -> list[str]:
    lines = []
    for source, name in (("draft", "The draft"), ("cache", "The suffix cache")):
        if drafted := rolling.drafted_by[source]:
            accepted = rolling.accepted_by[source]
            lines.append(
                f"{name} drafted {drafted} tokens, of which {accepted} were accepted: {accepted / max(rolling.new_tokens, 1):.0%} of what was "
                "generated."
            )
    return lines


def _earnings_lines(lookahead: DraftPolicy) -> list[str]:
    ratio, wants = lookahead.earnings.ratio, lookahead.has_draft and lookahead.wants_cache
    if ratio is None or not wants:
        return []
    line = f"Beside the suffix cache alone the draft made rounds an estimated {ratio:.2f} times as fast, of what each would have been without it."
    if not lookahead.earnings.in_credit:
        line += " It is not asked for now, for it has lost more than it earned."
    return [line]


def _speed_lines(rolling: CallStats, lookahead: DraftPolicy) -> list[str]:
    observed = observed_speedup(rolling, lookahead)
    if observed is None:
        return []
    c = lookahead.costs.c or 0.0
    expected = rolling.new_tokens / max(rolling.draft_steps * c + _verification(rolling, lookahead), 1e-9)
    return [
        f"Speed-up over plain decoding, prompts included in the time: observed {observed:.2f}× over the last {rolling.requests} requests, "
        f"{rolling.tokens_per_round:.2f} tokens a round; {expected:.2f}× expected of c, v and these rounds."
    ]


def _verification(rolling: CallStats, lookahead: DraftPolicy) -> float:
    """Sums the time of the rounds' verifications, in one-token target steps."""
    longest = max(rolling.verified_lengths, default=1)
    v = lookahead.costs.v_upto(longest)
    return sum(count * v[n - 1] for n, count in rolling.verified_lengths.items())
