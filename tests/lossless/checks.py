"""What the lossless suite asks of a draft, as plain functions of models. The tests run them, and test_mutations.py runs the same ones
on planted bugs. Next to what hf_osd does stands what it should have done, of reference.py.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from hf_osd import OnlineAssistant
from hf_osd.feedback.feedback import ACCEPTED, TAIL_FLOOR, UNTESTED, Feedback
from hf_osd.metrics.stats import CallStats

from .reference import Block, blocks_of, exact_distribution, p_value, processors_of, scores_of, speculate

# Sums in another order (cached and uncached attention) differ by about 1e-5 in models this small.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@dataclass
class Served:
    """One call: its output `(1, L+N)`, what it recorded and the `top_k` it was to keep, its statistics, and the γ that the lookahead
    chose, round by round."""

    output: Tensor
    feedback: Feedback
    stats: CallStats
    lengths: list[int]
    top_k: int


# What an update has learnt serves from the next call on, however long learning takes here. Its one step, for past requests are not learnt again, changes the weights at once.
SERVES_AT_ONCE = {"gate": False, "learning_budget": 1.0, "warmup_steps": 0, "replay_ratio": 0.0}


def assistant_of(draft: PreTrainedModel, **config) -> OnlineAssistant:
    """An assistant that drafts a constant γ with its draft alone, keeps its distributions whole and learns only when told to."""
    settings = {"lookahead": "constant", "update_interval": 10**6, "top_k": 64, "feedback_dtype": "float32"}
    settings |= {"suffix_cache": False, "learning_rate": 1e-3, **SERVES_AT_ONCE}
    return OnlineAssistant(draft, **settings | config)


def serve(target: PreTrainedModel, assistant: OnlineAssistant, prompt: Tensor, **kwargs) -> Served:
    """One call of `target.generate(**kwargs)` with `assistant`, and what it left behind."""
    lengths, lookahead = [], assistant.lookahead
    choose, observe = lookahead.plan, lookahead.observe_round
    selective = False

    def plan(*args, **kwargs):
        nonlocal selective
        lengths.append((chosen := choose(*args, **kwargs)).length)
        selective = chosen.selective
        return chosen

    def observe_round(drafted, *args, **kwargs):
        if selective:  # it was the draft's confidence that chose
            lengths[-1] = drafted
        observe(drafted, *args, **kwargs)

    lookahead.plan, lookahead.observe_round = plan, observe_round
    try:
        output = target.generate(prompt, assistant_model=assistant, pad_token_id=0, **{**unpadded(prompt), **kwargs})
    finally:
        del lookahead.plan, lookahead.observe_round
    assistant.update()
    new = assistant.buffer.new()
    return Served(output, new[-1], assistant.stats.last, lengths, assistant.osd_config.top_k)


def unpadded(prompt: Tensor) -> dict:
    """generate would take a 0 of the prompt for padding."""
    return {"attention_mask": torch.ones_like(prompt)}


@contextmanager
def forwards_of(target: PreTrainedModel) -> Iterator[list]:
    """A list that grows by one with each forward of `target`, those that find out whether it can verify included."""
    seen = []
    handle = target.register_forward_pre_hook(lambda module, inputs: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


# The checks.


def check_greedy(
    target, draft, prompt: Tensor, n: int, eos=(), extra=(), config=None, assistant=None, alpha_at="all", **kwargs
) -> Served:
    """Output, rounds, outcomes, counts and feedback of a greedy call are those of the plain reference."""
    assistant = assistant or assistant_of(draft, **(config or {}))
    asked = {"max_new_tokens": n, "do_sample": False, "eos_token_id": list(eos) or None, **kwargs}
    asked |= {"logits_processor": LogitsProcessorList(extra)} if extra else {}
    plain = target.generate(prompt, pad_token_id=0, **{**unpadded(prompt), **asked, "streamer": None})
    with forwards_of(target) as forwards:
        served = serve(target, assistant, prompt, **asked)
    assert torch.equal(served.output, plain), (served.output, plain)
    length = prompt.shape[1]
    processors = processors_of(length, eos, extra, **kwargs)
    blocks = list(speculate(draft, prompt[0], plain[0, length:].tolist(), served.lengths, n, eos, processors))
    assert served.feedback.outcome.tolist() == [outcome for block in blocks for outcome in block.outcomes]
    assert served.stats.drafted == sum(len(block.drafted) for block in blocks)
    assert len(forwards) == len(blocks) + served.stats.verification_forwards
    check_counts(served, blocks)
    check_feedback(served, target, draft, length, processors, sampled=False, alpha_at=alpha_at)
    return served


def check_sampled(target, draft, prompt: Tensor, n: int, eos=(), extra=(), config=None, **kwargs) -> Served:
    """Counts and feedback of a sampled call are what fresh forwards over its output say. (What it samples: `check_sampling`.)"""
    asked = {"max_new_tokens": n, "do_sample": True, "top_k": 0, "eos_token_id": list(eos) or None, **kwargs}
    processors = processors_of(prompt.shape[1], eos, extra, **asked)
    asked |= {"logits_processor": LogitsProcessorList(extra)} if extra else {}
    with forwards_of(target) as forwards:
        served = serve(target, assistant_of(draft, **(config or {})), prompt, **asked)
    blocks = blocks_of(served.feedback)
    assert len(forwards) == len(blocks) + served.stats.verification_forwards
    if not eos:  # else a draft rejected before may have been cut at its EOS
        rooms, left = [], n
        for wished, block in zip(served.lengths, blocks, strict=True):
            rooms.append(min(wished, left - 1))
            left -= len(block.said)
        assert served.stats.drafted == sum(rooms)
        assert [block.tested for block in blocks] == [
            min(n, b.accepted + 1) for n, b in zip(rooms, blocks, strict=True)
        ]
    check_counts(served, blocks)
    check_feedback(served, target, draft, prompt.shape[1], processors, sampled=True)
    return served


def check_padded(target, draft, prompt: Tensor, padding: int, gamma: int, do_sample=False) -> Served:
    """Left padding changes neither the output nor what is recorded, which holds none of it. Padded with a token of the vocabulary."""
    padded = torch.nn.functional.pad(prompt, (padding, 0), value=3)
    mask = torch.nn.functional.pad(torch.ones_like(prompt), (padding, 0))
    asked = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": do_sample, "top_k": 0}
    served = serve(target, assistant_of(draft, num_assistant_tokens=gamma), padded, **asked)
    text = served.output[0, padding:]
    assert torch.equal(served.output[:, : padded.shape[1]], padded)
    if not do_sample:
        plain = target.generate(padded, pad_token_id=0, **asked)
        assert torch.equal(served.output, plain)
        answer = plain[0, padded.shape[1] :].tolist()
        check_counts(served, list(speculate(draft, prompt[0], answer, served.lengths, 16, (), ())))
    check_feedback(served, target, draft, prompt.shape[1], sampled=do_sample, text=text)
    return served


def check_lease(target, draft, assistant, prompt: Tensor, n: int, streamer) -> Served:
    """Whatever `streamer` does to `assistant` in mid-call, the call goes on with the weights it began with, those of `draft`."""
    held = assistant.serving.active
    before = [p.clone() for p in held.parameters()]
    served = check_greedy(target, draft, prompt, n, assistant=assistant, streamer=streamer)
    assert streamer.results, "nothing happened in mid-call"
    assert all(torch.equal(p, was) for p, was in zip(held.parameters(), before, strict=True))
    return served


def check_counts(served: Served, blocks: list[Block]):
    stats = served.stats
    tested = Counter(i for block in blocks for i in range(block.tested))
    accepted = Counter(i for block in blocks for i in range(block.accepted))
    assert (stats.requests, stats.rounds, stats.new_tokens) == (
        1,
        len(blocks),
        sum(len(block.said) for block in blocks),
    )
    assert (stats.tested, stats.accepted) == (tested.total(), accepted.total())
    expected = [accepted[i] / tested[i] for i in range(len(tested))]
    assert stats.to_dict()["acceptance_by_position"] == expected
    guesses = [(block.drafted[: block.tested] + [-1] * len(block.said))[: len(block.said)] for block in blocks]
    assert served.feedback.drafted.tolist() == list(chain(*guesses))


def check_feedback(
    served: Served, target, draft, prompt_length: int, processors=(), sampled=False, text=None, alpha_at="all"
):
    """What was recorded is what fresh forwards over the output say. `text` `(L,)`: the output without padding."""
    feedback, text = served.feedback, served.output[0] if text is None else text
    assert feedback.prompt_length == prompt_length
    assert torch.equal(feedback.tokens.long(), text)
    assert feedback.sampled == sampled
    same = torch.testing.assert_close

    log_p = scores_of(target, text, prompt_length).log_softmax(-1)
    ids = feedback.top_ids.long()
    assert ids.shape[1] == min(served.top_k, log_p.shape[1])
    same(feedback.top_logps, log_p.topk(ids.shape[1]).values, **CLOSE)
    same(feedback.top_logps, log_p.gather(-1, ids), **CLOSE)
    same(feedback.tail_logp, log_p.scatter(-1, ids, -torch.inf).logsumexp(-1).clamp_min(TAIL_FLOOR), **CLOSE)

    log_q = scores_of(draft, text, prompt_length, processors).log_softmax(-1)
    tested, drafted = feedback.outcome != UNTESTED, feedback.drafted.long()
    assert torch.equal(feedback.outcome == ACCEPTED, tested & (drafted == feedback.answer))
    assert torch.equal(tested, drafted != -1)
    assert feedback.draft_logps[~tested].isnan().all()
    assert feedback.drafted_logp[~tested].isnan().all()
    same(feedback.draft_logps[tested], log_q.gather(-1, ids)[tested], **CLOSE)
    same(feedback.drafted_logp[tested], log_q.gather(-1, drafted.clamp_min(0)[:, None])[:, 0][tested], **CLOSE)
    if sampled:
        p = scores_of(target, text, prompt_length, processors).softmax(-1)
        overlap = torch.minimum(p, log_q.exp()).sum(-1)
    else:
        assert torch.equal(drafted[tested], log_q.argmax(-1)[tested])
        overlap = (log_q.argmax(-1) == feedback.answer).float()
    known = ~feedback.overlap.isnan()
    assert known[tested].all()
    # The next draft answers for a bonus token, but a last round of one token has none; and a user's processor, which may keep state, is
    # not asked about the past.
    if min(served.lengths) > 0 and all(type(p).__module__.startswith("transformers.") for p in processors):
        assert known[:-2].all()
    compared = tested if alpha_at == "tested" else known
    same(feedback.overlap[compared], overlap[compared], **CLOSE)
    assert served.stats.overlap_count == int(known.sum())
    assert abs(served.stats.overlap_sum - float(feedback.overlap[known].sum())) < 1e-3


def check_sampling(
    target, draft, n: int, calls: int, gamma: int, seed: int = 0, prompt=((1, 2, 3),), eos=(), between=None, streamer=None,
    config=None, **kwargs,
):  # fmt: skip
    """Answers of n tokens come as often as the target alone would give them: χ² over whole answers, and over their beginnings, which
    have more power. `between(assistant, i)` is run before call i, and `streamer(assistant)` made for each.
    """
    asked = {"do_sample": True, "top_k": 0, **kwargs}
    prompt = torch.tensor(prompt)
    exact = exact_distribution(target, prompt, n, eos, **asked)
    assistant = assistant_of(draft, **{"num_assistant_tokens": gamma, "learn": False, **(config or {})})
    counts = Counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for i in range(calls):
            if between is not None:
                between(assistant, i)
            output = target.generate(
                prompt, max_new_tokens=n, assistant_model=assistant, pad_token_id=0, eos_token_id=list(eos) or None,
                streamer=streamer and streamer(assistant), **asked,
            )  # fmt: skip
            counts[tuple(output[0, prompt.shape[1] :].tolist())] += 1
    assert counts.keys() <= exact.keys(), f"answers that the target never gives: {counts.keys() - exact.keys()}"
    for length in range(1, n + 1):
        began, probabilities = Counter(), Counter()
        for answer, count in counts.items():
            began[answer[:length]] += count
        for answer, p in exact.items():
            probabilities[answer[:length]] += p
        p = p_value(began, probabilities)
        assert p > 1e-4, f"p={p:.1e} of the first {length} tokens"
    total = assistant.stats.total
    assert 0 < total.accepted < total.tested  # else nothing was tried
    return assistant
