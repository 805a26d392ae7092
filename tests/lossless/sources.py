"""What the tests of drafts' sources share (the suffix cache, blocks that a draft begins and the cache ends, heads of some rows, tenants), and
their checks as plain functions, which test_mutations.py runs on planted bugs too. What is recorded must be what fresh forwards say.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import LogitsProcessor, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria

from hf_osd import OnlineAssistant, OnlineCandidateGenerator
from hf_osd.drafting.draft_model import DraftModelProposer
from hf_osd.drafting.suffix_cache import CallSuffixes
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED
from hf_osd.policy.lookahead import Plan

from . import checks
from .checks import assistant_of, check_feedback, check_sampling, unpadded
from .models import one_layer
from .reference import scores_of

NAMES = ["Llama", "GPT2", "Gemma3", "Mistral", "T5", "Bart"]
DECODERS = NAMES[:4]
PROMPTS = torch.randint(2, 60, (4, 1, 6), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
# No clock is read: what is drafted depends on what was said alone.
COSTS = {"lookahead": "cost", "draft_cost": 0.05, "verify_cost": 0.01}
BOTH = {**COSTS, "suffix_cache": True, "num_assistant_tokens": 4}
FEW = {"draft_head": "traffic", "draft_vocab_size": 8}
CALLS = 320
REPEATS = ((1, 2, 1, 2, 1),)


def alone(**config) -> OnlineAssistant:
    """An assistant without a draft."""
    return OnlineAssistant(**COSTS | config)


def answer_to(target, assistant, prompt, **kwargs):
    """The output of a greedy call, which must be that of the target alone."""
    asked = {**GREEDY, **unpadded(prompt), **kwargs}
    plain = target.generate(prompt, **asked)
    output = target.generate(prompt, assistant_model=assistant, **asked)
    assert torch.equal(output, plain), (output, plain)
    return output


@contextmanager
def mixed(assistant: OnlineAssistant, own: int = 1) -> Iterator[None]:
    """Blocks that the draft begins with `own` tokens and the cache ends, where it has anything; of every five the fourth is the cache's alone, and
    the fifth nobody's."""
    lookahead, rounds = assistant.lookahead, []

    def plan(match=0, agreement=(), can_draft=True, unread=1, carried=None):
        rounds.append(1)
        turn = len(rounds) % 5
        return (
            Plan("cache", len(agreement) if turn == 4 else 0)
            if turn in (4, 0)
            else Plan("draft", lookahead.max_gamma, True)
        )

    forced = {
        "plan": plan,
        "cache_suffix_length": lambda j, prefix_acceptance, match, agreement: len(agreement) if j >= own else 0,
        "should_keep": lambda j, prefix_acceptance, instead=0.0: True,
        "should_step": lambda j, prefix_acceptance: True,
    }
    vars(lookahead).update(forced)
    try:
        yield
    finally:
        for name in forced:
            delattr(lookahead, name)


@contextmanager
def rounds_seen() -> Iterator[list]:
    """The rounds of the calls in it: their blocks, and the tokens of the draft's head as they were drafted from, `None` if it was whole."""
    seen, heads = [], []
    update, draft = OnlineCandidateGenerator.update_candidate_strategy, DraftModelProposer.draft

    def drafting(self, *args):
        block = draft(self, *args)
        head = self.context.head
        heads.append(None if head is None else frozenset(head.ids.flatten().tolist()))
        return block

    def updating(self, *args):
        seen.append((self._block, heads[-1] if heads else None))
        return update(self, *args)

    OnlineCandidateGenerator.update_candidate_strategy, DraftModelProposer.draft = updating, drafting
    try:
        yield seen
    finally:
        OnlineCandidateGenerator.update_candidate_strategy, DraftModelProposer.draft = update, draft


@contextmanager
def proposals_seen() -> Iterator[list[list[int]]]:
    """All that the cache proposed."""
    seen, original = [], CallSuffixes.continuation

    def continuation(self, *args):
        found = original(self, *args)
        seen.append(found.tokens if found else [])
        return found

    CallSuffixes.continuation = continuation
    try:
        yield seen
    finally:
        CallSuffixes.continuation = original


def last_call(assistant: OnlineAssistant):
    """Statistics and feedback, `None` without a draft, of the call that has just ended."""
    assistant.collect()
    new = assistant.buffer.new()
    return assistant.stats.last, new[-1] if new else None


def check_account(stats, feedback, blocks, answer: list[int]):
    """Outcomes and counts are what follows from the blocks and the answer: what the cache drafted is untested, and counted as the cache's."""
    outcome, guesses, counts = [], [], {"drafted": Counter(), "tested": Counter(), "accepted": Counter()}
    for block in blocks:
        left = answer[len(outcome) :]
        hits = [a == b for a, b in zip(block.tokens, left, strict=False)] + [False]
        accepted = hits.index(False)
        said = min(accepted + 1, len(left))
        tested = min(said, block.n)
        own = min(tested, len(block.draft_tokens))
        outcome += [ACCEPTED if j < accepted else REJECTED for j in range(own)] + [UNTESTED] * (said - own)
        guesses += block.tokens[:own] + [-1] * (said - own)
        for name, n in (("drafted", block.n), ("tested", tested), ("accepted", accepted)):
            counts[name]["draft"] += min(n, len(block.draft_tokens))
            counts[name]["cache"] += max(n - len(block.draft_tokens), 0)
    assert len(outcome) == len(answer) == stats.new_tokens
    assert stats.rounds == len(blocks)
    assert stats.verified_lengths == Counter(block.n + 1 for block in blocks)
    assert (stats.drafted_by, stats.tested_by, stats.accepted_by) == tuple(counts.values())
    assert (stats.drafted, stats.tested, stats.accepted) == tuple(c.total() for c in counts.values())
    assert stats.draft_steps == sum(block.steps for block in blocks)
    if feedback is not None:
        assert feedback.outcome.tolist() == outcome
        assert feedback.drafted.tolist() == guesses


def check_mixed(target, draft, assistant, prompts, own: int = 1, processors=None, **kwargs):
    """Greedy calls of mixed blocks: output, account and feedback. Such blocks must have come, and been accepted in part."""
    kinds, decoder = Counter(), not target.config.is_encoder_decoder
    for prompt in prompts:
        with mixed(assistant, own), rounds_seen() as seen:
            output = answer_to(target, assistant, prompt, **kwargs)
        blocks = [block for block, _ in seen]
        kinds.update((bool(block.draft_tokens), bool(block.cached)) for block in blocks)
        start = prompt.shape[1] if decoder else 1
        stats, feedback = last_call(assistant)
        check_account(stats, feedback, blocks, output[0, start:].tolist())
        if decoder:
            served = checks.Served(output, feedback, stats, [0], assistant.osd_config.top_k)
            check_feedback(served, target, draft, start, processors(prompt) if processors else ())
        # The draft caught up with all before the last round in which it was asked.
        if processors is None:
            until = max(i for i, block in enumerate(blocks) if block.steps)
            before = sum(
                min(block.n, _accepted(block, i, blocks, output[0, start:])) + 1
                for i, block in enumerate(blocks[:until])
            )
            assert not feedback.overlap[:before].isnan().any()
    assert kinds.keys() >= {(True, True), (False, True), (False, False)}
    total = assistant.stats.total
    assert 0 < total.accepted_by["draft"] < total.tested_by["draft"]
    assert 0 < total.accepted_by["cache"] < total.tested_by["cache"]


def _accepted(block, i, blocks, answer) -> int:
    done = 0
    for one in blocks[: i + 1]:
        left = answer[done:].tolist()
        accepted = ([a == b for a, b in zip(one.tokens, left, strict=False)] + [False]).index(False)
        done += accepted + 1
    return accepted


class Counting(LogitsProcessor):
    """With state: favours another token at each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_add(-1, torch.tensor([self.calls % 3]), torch.full((1, 1), 6.0))


def check_ends(target, draft, kind: str, tokenizer=None):
    """The text ends at each of its tokens in turn, all of them cached, and with them what came after."""
    for prompt in PROMPTS[:2]:
        assistant = alone() if draft is None else assistant_of(draft, **BOTH)
        answer = answer_to(target, assistant, prompt)[0, prompt.shape[1] :].tolist()
        for i in range(1, 14):
            end = {
                "eos": {"eos_token_id": answer[i]},
                "length": {"max_new_tokens": i},
                "a criterion": {"stopping_criteria": StoppingCriteriaList([EosTokenCriteria([answer[i]])])},
                "stop string": tokenizer and {"stop_strings": [tokenizer.decode([answer[i]])], "tokenizer": tokenizer},
            }[kind]
            if draft is None:
                answer_to(target, assistant, prompt, **end)
            else:
                with mixed(assistant):
                    answer_to(target, assistant, prompt, **end)
        assistant.collect()
        assert assistant.stats.total.accepted_by["cache"] > 30


def check_sampled_sources(draft, vocab: int = 5, n: int = 3, mixes=False, sources=("cache",), config=None, **kwargs):
    """χ² over answers, with the cache filled by those before; each of the sources must have been accepted and rejected."""
    with ExitStack() as stack:

        def between(assistant, i):
            if mixes and i == 0:
                stack.enter_context(mixed(assistant))

        config = {**BOTH, **(config or {})}
        target = one_layer(vocab)
        assistant = check_sampling(
            target, draft, n, CALLS, 4, prompt=REPEATS, between=between, config=config, **kwargs
        )
    assistant.collect()
    total = assistant.stats.total
    for source in sources:
        assert 0 < total.accepted_by[source] < total.tested_by[source]
    return assistant


def check_few_rows(target, draft, assistant, prompt, **kwargs):
    """A greedy call with a draft of some rows: what is recorded is what the draft says with all its other logits at -inf. The statistics, the
    tokens of the head round by round, and the tokens drafted."""
    with rounds_seen() as seen:
        output = answer_to(target, assistant, prompt, **kwargs)
    start = prompt.shape[1]
    text, answer = output[0], output[0, start:].tolist()
    stats, feedback = last_call(assistant)
    check_account(stats, feedback, [block for block, _ in seen], answer)
    whole = scores_of(draft, text, start)
    rows, lacked, missed, done = torch.full_like(whole, -torch.inf), 0, 0, 0
    # The end of the text, about which the draft was not asked, it may be scored at afterwards, with all rows.
    blocks = [block for block, _ in seen]
    last = max(i for i, block in enumerate(blocks) if block.steps)
    until = sum(_accepted(block, i, blocks, text[start:]) + 1 for i, block in enumerate(blocks[:last]))
    known = ~feedback.overlap.isnan() & (torch.arange(len(answer)) < until + len(blocks[last].draft_logits))
    for i, (block, head) in enumerate(seen):
        said = _accepted(block, i, [block for block, _ in seen], text[start:]) + 1
        for j in range(done, min(done + said, len(answer))):
            ids = sorted(head)
            rows[j, ids] = whole[j, ids]
            lacked += answer[j] not in head
            missed += bool(known[j]) and answer[j] not in head and int(whole[j].argmax()) == answer[j]
        done += said
    log_q = rows.log_softmax(-1)
    tested = feedback.outcome != UNTESTED
    assert known[:until].all()
    hit = log_q.argmax(-1) == feedback.answer
    assert torch.equal(feedback.overlap[known], hit[known].float())
    assert torch.equal(feedback.drafted[tested].long(), log_q.argmax(-1)[tested])
    ids = feedback.top_ids.long()
    torch.testing.assert_close(feedback.draft_logps[tested], log_q.gather(-1, ids)[tested], **checks.CLOSE)
    drafted = feedback.drafted.long().clamp_min(0)[:, None]
    torch.testing.assert_close(feedback.drafted_logp[tested], log_q.gather(-1, drafted)[tested, 0], **checks.CLOSE)
    assert (stats.head_tokens, stats.head_lacked, stats.head_missed) == (len(answer), lacked, missed)
    assert stats.head_coverage == 1 - lacked / len(answer)
    assert stats.head_alpha_loss == missed / stats.overlap_count
    return stats, [head for _, head in seen], feedback.drafted.tolist()


def proposals_to(target, assistant, prompt) -> list[list[int]]:
    with proposals_seen() as seen:
        answer_to(target, assistant, prompt)
    assistant.collect()
    return seen


def check_tenants(target):
    """What is proposed to one tenant is what would be if the others had never come. Under a constant policy, which knows no past."""
    for names in [("a", "b"), ("a", None), (None, "a"), (("acme", 1), ("acme", 2))]:
        shared, fresh = (OnlineAssistant(lookahead="constant") for _ in range(2))
        one, other = (shared if name is None else shared.tenant(name) for name in names)
        first = proposals_to(target, one, PROMPTS[0])
        apart = proposals_to(target, other, PROMPTS[0])
        assert first == apart == proposals_to(target, fresh, PROMPTS[0])
        again = proposals_to(target, one, PROMPTS[0])
        assert again != first
        assert again == proposals_to(target, fresh, PROMPTS[0])
        assert shared.stats.last.accepted_by["cache"] >= 18
