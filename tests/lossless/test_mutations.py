"""Planted bugs, each of which the suite's own checks must catch: they pass on the library as it is, and fail on each mutant."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteriaList
from transformers.generation import utils as generation
from transformers.generation.stopping_criteria import EosTokenCriteria

from hf_osd import OnlineCandidateGenerator
from hf_osd.drafting import processors
from hf_osd.drafting.context import DraftContext, DraftLogits
from hf_osd.drafting.draft_model import DraftModelProposer
from hf_osd.drafting.processors import VerifiedProcessors
from hf_osd.drafting.stopping import DraftStops
from hf_osd.drafting.suffix_cache import SuffixCaches
from hf_osd.drafting.vocab_mapping import VocabMapping
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, TAIL_FLOOR, SparseLogits
from hf_osd.generation.recorder import CallRecorder
from hf_osd.models.hot_swap import HotSwapDraft

from .checks import assistant_of, check_greedy, check_lease, check_sampling
from .models import InMidCall, one_layer, retrained
from .processors import Biased
from .sources import BOTH, check_ends, check_few_rows, check_mixed, check_sampled_sources, check_tenants

PROMPT = torch.tensor([[3, 7, 11, 5, 2]])


class Counting(LogitsProcessor):
    """With state: favours another token at each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_add(-1, torch.tensor([self.calls % scores.shape[-1]]), torch.full((1, 1), 4.0))


# The checks that are to catch them. Each builds what it needs, so that nothing of a mutant is left in the next one.


class Checks:
    def __init__(self, tiny_llama, noised_copy):
        self.target = tiny_llama(vocab=16, bos_token_id=None, eos_token_id=None, pad_token_id=0)
        self.draft = noised_copy(self.target, 0.3, seed=1)
        self.wide = tiny_llama(bos_token_id=None, eos_token_id=None, pad_token_id=0)
        self._noised = noised_copy
        self._passed: set[str] = set()

    def greedy(self):
        check_greedy(self.target, self.draft, PROMPT, 16, config={"num_assistant_tokens": 3, "top_k": 4})

    def greedy_processed(self):
        check_greedy(self.target, self.draft, PROMPT, 16, extra=(Biased(),), repetition_penalty=1.5)

    def greedy_to_an_eos(self):
        """Inside a block that is the target's own."""
        answer = self.target.generate(PROMPT, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, PROMPT.shape[1] :]
        check_greedy(self.target, self.target, PROMPT, 16, eos=[int(answer[1])])

    def sampled(self):
        target = one_layer(5)
        check_sampling(target, self._noised(target, 1.0, seed=1), n=3, calls=320, gamma=2)

    def sampled_hot(self):
        target = one_layer(5)
        draft = self._noised(target, 1.0, seed=1)
        check_sampling(target, draft, n=3, calls=320, gamma=2, temperature=3.0)

    def leases(self):
        assistant = assistant_of(self.draft, num_assistant_tokens=3)
        others = iter(retrained(self.draft, 0.3, seed) for seed in range(99))
        check_lease(self.target, self.draft, assistant, PROMPT, 16, InMidCall(lambda: assistant.refresh(next(others))))

    def state(self):
        plain, assisted = (
            self.target.generate(
                PROMPT, max_new_tokens=16, do_sample=False, pad_token_id=0, logits_processor=[Counting()], **kwargs
            )
            for kwargs in ({}, {"assistant_model": assistant_of(self.draft, num_assistant_tokens=3)})
        )
        assert torch.equal(plain, assisted)

    def stops(self):
        for draft in (self.target, self.draft):
            for token in range(16):
                asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
                asked["stopping_criteria"] = StoppingCriteriaList([EosTokenCriteria([token])])
                plain = self.target.generate(PROMPT, **asked)
                assisted = self.target.generate(PROMPT, assistant_model=assistant_of(draft), **asked)
                assert torch.equal(plain, assisted)

    def vocabularies(self):
        """A draft with two rows fewer than its target, of which it is a copy else, is right about all others."""
        config = type(self.target.config)(**{**self.target.config.to_dict(), "vocab_size": 14})
        draft, state = type(self.target)(config).eval(), self.target.state_dict()
        ends = ("embed_tokens.weight", "lm_head.weight")
        draft.load_state_dict({name: p[:14] if name.endswith(ends) else p for name, p in state.items()})
        words = _Words()
        assistant = assistant_of(draft)
        asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [14, 15]}
        plain = self.target.generate(PROMPT, **asked)
        served = self.target.generate(
            PROMPT, assistant_model=assistant, tokenizer=words, assistant_tokenizer=words, **asked
        )
        assert torch.equal(plain, served)
        assert assistant.stats.total.alpha_live == 1.0

    def blocks_of_two(self):
        """Of draft and cache, greedy."""
        prompts = [PROMPT, PROMPT.flip(1), PROMPT, PROMPT.flip(1), PROMPT + 1]
        check_mixed(self.target, self.draft, assistant_of(self.draft, **BOTH), prompts)

    def sampled_blocks_of_two(self):
        check_sampled_sources(self._noised(one_layer(5), 1.0, seed=1), mixes=True)

    def ends_in_cached_blocks(self):
        check_ends(self.wide, None, "a criterion")

    def few_rows(self):
        assistant = assistant_of(self.draft, draft_head="traffic", draft_vocab_size=4)
        check_few_rows(self.target, self.draft, assistant, PROMPT)

    def sampled_from_few_rows(self):
        few = {"draft_head": "traffic", "draft_vocab_size": 2, "suffix_cache": False, "lookahead": "constant"}
        check_sampled_sources(self._noised(one_layer(6), 0.5, seed=1), 6, sources=("draft",), config=few)

    def tenants(self):
        check_tenants(self.wide)

    def passes(self, name: str):
        if name not in self._passed:
            getattr(self, name)()
            self._passed.add(name)


class _Words:
    """As much of a tokenizer as a padded pair needs."""

    unk_token_id = pad_token_id = eos_token_id = None

    def get_vocab(self):
        return {str(i): i for i in range(14)}


@pytest.fixture(scope="module")
def checks(tiny_llama, noised_copy):
    return Checks(tiny_llama, noised_copy)


# The bugs. Each is (what, the check that must fail, owner and name of what it replaces, its replacement given the original).


def other_scores(original):
    """The scores handed over are not those that the drafts were sampled from."""

    def get_candidates(self, input_ids, **kwargs):
        candidates, scores = original(self, input_ids, **kwargs)
        return candidates, None if scores is None else scores / 3

    return get_candidates


def rejected_from_p(original):
    """What replaces a rejected draft is drawn from p, not from the residual of p over q."""

    def speculative_sampling(candidate_input_ids, candidate_logits, candidate_length, new_logits, **kwargs):
        tokens, matches = original(candidate_input_ids, candidate_logits, candidate_length, new_logits, **kwargs)
        if matches < candidate_length:
            tokens = tokens.clone()
            tokens[0, -1] = torch.multinomial(new_logits[0, matches].softmax(-1), 1)
        return tokens, matches

    return speculative_sampling


def always_accepted_if_likelier(original):
    """Acceptance by p > q instead of with probability p/q."""

    def speculative_sampling(candidate_input_ids, candidate_logits, candidate_length, new_logits, **kwargs):
        rand_like = torch.rand_like
        torch.rand_like = torch.ones_like
        try:
            return original(candidate_input_ids, candidate_logits, candidate_length, new_logits, **kwargs)
        finally:
            torch.rand_like = rand_like

    return speculative_sampling


def sampled_with_other_processors(original):
    """The draft samples through the call's processors, and hands over scores of before them."""

    def draft(self, input_ids, plan, text):
        given = self._verified.for_drafting
        raw = []

        def for_drafting():
            inner = given()

            def process(ids, scores):
                raw.append(scores.clone())
                return inner(ids, scores)

            return process

        self._verified.for_drafting = for_drafting
        try:
            block = original(self, input_ids, plan, text)
        finally:
            del self._verified.for_drafting
        block.scores = raw
        return block

    return draft


def rows_off_by_one(original):
    def add_round(self, pieces, raw, *args):
        return original(self, pieces, raw.roll(1, 0), *args)

    return add_round


def prompt_off_by_one(original):
    def to_feedback(self, shared=0):
        feedback = original(self, shared)
        return feedback and replace(feedback, prompt_length=feedback.prompt_length + 1)

    return to_feedback


def bonus_counted_as_accepted(original):
    def add_round(self, pieces, raw, block, accepted, tested, *args):
        return original(self, pieces, raw, block, min(accepted + 1, tested), tested, *args)

    return add_round


def matches_at_face_value(original):
    """num_matches is one short where a block ends with an accepted EOS: the EOS is read as a rejection."""

    def update_candidate_strategy(self, input_ids, scores, num_matches):
        if num_matches < len(self._block.draft_tokens):
            self._block.draft_tokens[num_matches] = (self._block.draft_tokens[num_matches] + 1) % scores.shape[-1]
        return original(self, input_ids, scores, num_matches)

    return update_candidate_strategy


def stale_cache_row(original):
    """The rejected draft's keys and values stay in the cache, in the place of the last verified token's."""

    def crop(self, accepted):
        kept, layers = self.length + accepted, self._cache.layers
        rejected = [
            (layer.keys[:, :, kept : kept + 1], layer.values[:, :, kept : kept + 1]) for layer in layers if kept
        ]
        original(self, accepted)
        for layer, (keys, values) in zip(layers, rejected, strict=True):
            if keys.shape[2]:
                layer.keys = torch.cat([layer.keys[:, :, :-1], keys], dim=2)
                layer.values = torch.cat([layer.values[:, :, :-1], values], dim=2)

    return crop


def processed_twice(original):
    def call(self, input_ids, scores):
        return self.processors(input_ids, original(self, input_ids, scores))

    return call


def kept_after_processing(original):
    """The row that is kept is the one that processors then change in place."""

    def call(self, input_ids, scores):
        processed = original(self, input_ids, scores)
        self._rows[-1] = processed
        return processed

    return call


def asked_about_what_never_came_true(original):
    return lambda processor: False


def written_while_leased(original):
    def refresh(self, weights):
        with torch.no_grad():
            for name, p in self.active.named_parameters():
                if name in self.trainable:
                    p.copy_(weights[name])
        return original(self, weights)

    return refresh


def without_tail(original):
    def from_logits(cls, *args, **kwargs):
        rows = original.__func__(cls, *args, **kwargs)
        return replace(rows, tail_logp=torch.full_like(rows.tail_logp, TAIL_FLOOR))

    return classmethod(from_logits)


def past_the_stop(original):
    return lambda self, input_ids: False


def another_token_read(original):
    """The draft reads another token than the one it drafted."""

    def shared_to_draft(self, token):
        return (original(self, token) + 1) % self.draft_size

    return shared_to_draft


def another_token_is_sure(original):
    """A cached token is handed over as though another one had been certain."""

    def get_candidates(self, input_ids, **kwargs):
        candidates, scores = original(self, input_ids, **kwargs)
        if scores is not None and self._block.cached:
            own = len(self._block.draft_tokens)
            scores = torch.cat([scores[:, :own], scores[:, own:].roll(1, -1)], dim=1)
        return candidates, scores

    return get_candidates


def unasked_cached_tokens(original):
    """The cache goes on where the text must end."""
    return lambda self, input_ids, room: None


def tokens_off_by_one(original):
    """A head of some rows takes its columns for those beside them."""
    return lambda self, columns: original(self, (columns + 1) % self.logits.shape[-1])


def cached_counted_as_drafted(original):
    """What the cache proposed is put to the draft's account."""

    def add_round(self, pieces, raw, block, accepted, tested, *args):
        original(self, pieces, raw, block, accepted, tested, *args)
        for j in range(min(tested, len(block.draft_tokens)), tested):
            self._rounds[-1].positions[j] = (block.tokens[j], ACCEPTED if j < accepted else REJECTED)

    return add_round


def one_for_all_tenants(original):
    return lambda self, tenant: original(self, None)


def all_rows_handed_over(original):
    """The scores of all rows, where the tokens were drawn from some."""
    return lambda self, block, n: torch.cat(
        [self.context.head.full(logits.hidden) for logits in block.draft_logits[:n]]
    )


MUTANTS: list[tuple[Callable, str, object, str]] = [
    (other_scores, "sampled", OnlineCandidateGenerator, "get_candidates"),
    (rejected_from_p, "sampled", generation, "_speculative_sampling"),
    (always_accepted_if_likelier, "sampled", generation, "_speculative_sampling"),
    (sampled_with_other_processors, "sampled_hot", DraftModelProposer, "draft"),
    (rows_off_by_one, "greedy", CallRecorder, "add_round"),
    (prompt_off_by_one, "greedy", CallRecorder, "to_feedback"),
    (bonus_counted_as_accepted, "greedy", CallRecorder, "add_round"),
    (matches_at_face_value, "greedy_to_an_eos", OnlineCandidateGenerator, "update_candidate_strategy"),
    (stale_cache_row, "greedy", DraftContext, "crop"),
    (processed_twice, "greedy_processed", VerifiedProcessors, "__call__"),
    (kept_after_processing, "greedy_processed", VerifiedProcessors, "__call__"),
    (asked_about_what_never_came_true, "state", processors, "_may_keep_state"),
    (written_while_leased, "leases", HotSwapDraft, "refresh"),
    (without_tail, "greedy", SparseLogits, "from_logits"),
    (past_the_stop, "stops", DraftStops, "end"),
    (another_token_read, "vocabularies", VocabMapping, "shared_to_draft"),
    (another_token_is_sure, "sampled_blocks_of_two", OnlineCandidateGenerator, "get_candidates"),
    (unasked_cached_tokens, "ends_in_cached_blocks", OnlineCandidateGenerator, "_cut"),
    (tokens_off_by_one, "few_rows", DraftLogits, "tokens"),
    (cached_counted_as_drafted, "blocks_of_two", CallRecorder, "add_round"),
    (one_for_all_tenants, "tenants", SuffixCaches, "for_tenant"),
    (all_rows_handed_over, "sampled_from_few_rows", DraftModelProposer, "dense"),
]


@pytest.mark.parametrize(("mutant", "check", "owner", "name"), MUTANTS, ids=[mutant[0].__name__ for mutant in MUTANTS])
def test_the_suite_catches(checks, monkeypatch, mutant, check, owner, name):
    checks.passes(check)
    original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
    monkeypatch.setattr(owner, name, mutant(original))
    with pytest.raises(AssertionError):
        getattr(checks, check)()


def test_each_mutant_is_its_own():
    assert len({mutant[0] for mutant in MUTANTS}) == len(MUTANTS) >= 8
