"""The candidate generator: greedy output equal, sampling exact, and feedback that is what a fresh forward of the target says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.candidate_generator import AssistedCandidateGenerator
from transformers.generation.streamers import BaseStreamer

from hf_osd import OnlineAssistant, OnlineCandidateGenerator, grow_feature_draft
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED
from hf_osd.policy.lookahead import Plan

PROMPT = torch.tensor([[5, 9, 17, 3, 40, 22]])


@pytest.fixture(scope="module")
def serve(target):
    """`serve(draft, prompt, **generate kwargs) -> (output, feedback, stats)` of one call, with γ constant and nothing learnt."""

    def call(draft, prompt=PROMPT, config=None, **kwargs):
        settings = {"lookahead": "constant", "update_interval": 10**6, "top_k": 64, "feedback_dtype": "float32"}
        assistant = OnlineAssistant(draft, **{**settings, **(config or {})})
        output = target.generate(
            prompt, assistant_model=assistant, **{"max_new_tokens": 24, "do_sample": False, **kwargs}
        )
        assistant.update()
        [feedback] = assistant.buffer.new()
        return output, feedback, assistant.stats.last

    return call


def test_is_an_upstream_assisted_candidate_generator():
    assert issubclass(OnlineCandidateGenerator, AssistedCandidateGenerator)


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_greedy_output_is_the_targets_own(target, serve, noised_copy, scale, gamma):
    plain = target.generate(PROMPT, max_new_tokens=24, do_sample=False)
    output, _, _ = serve(noised_copy(target, scale), config={"num_assistant_tokens": gamma})
    assert torch.equal(plain, output)


def test_a_draft_equal_to_its_target_is_always_accepted_and_the_pattern_is_known(target, serve):
    """24 tokens in blocks of 5 drafts and a bonus; the last block has no room for all: max_length leaves 5 drafts and their bonus."""
    _, feedback, stats = serve(target, eos_token_id=None, pad_token_id=1)
    block = [ACCEPTED] * 5 + [UNTESTED]
    assert feedback.outcome.tolist() == block * 4
    assert (stats.rounds, stats.drafted, stats.tested, stats.accepted) == (4, 20, 20, 20)
    assert stats.alpha == stats.alpha_live == 1.0
    assert stats.tokens_per_round == 6.0


@given(st.integers(1, 6), st.sampled_from([0.05, 0.2, 0.5]), st.integers(0, 10**6), st.integers(1, 12))
def test_feedback_equals_a_fresh_forward_of_the_target(target, serve, noised_copy, gamma, scale, seed, prompt_length):
    """Off by one in rows, positions or outcomes; stale cache rows; a bonus row misplaced."""
    prompt = torch.randint(2, 64, (1, prompt_length), generator=torch.Generator().manual_seed(seed))
    draft = noised_copy(target, scale, seed)
    output, feedback, stats = serve(draft, prompt, config={"num_assistant_tokens": gamma})
    assert torch.equal(feedback.tokens.long(), output[0])
    with torch.no_grad():
        start = prompt_length - 1
        log_p = target(output).logits[0, start:-1].log_softmax(-1)
        log_q = draft(output).logits[0, start:-1].log_softmax(-1)
    # float32 sums in another order (cached and uncached attention): 1e-4 covers what tiny models show, about 1e-5.
    close = {"atol": 1e-4, "rtol": 1e-4}
    dense = torch.empty_like(log_p).scatter(-1, feedback.top_ids.long(), feedback.top_logps)  # k = V
    torch.testing.assert_close(dense, log_p, **close)

    predicted = log_q.argmax(-1)
    for i, outcome in enumerate(feedback.outcome.tolist()):
        if outcome == UNTESTED:
            assert feedback.drafted[i] == -1
            assert feedback.draft_logps[i].isnan().all()
            continue
        assert feedback.drafted[i] == predicted[i]
        assert (outcome == ACCEPTED) == (feedback.drafted[i] == feedback.answer[i])
        torch.testing.assert_close(feedback.draft_logps[i], log_q[i, feedback.top_ids[i].long()], **close)
        torch.testing.assert_close(feedback.drafted_logp[i], log_q[i, predicted[i]], **close)
    # α is known wherever the draft was ever put to the position, a bonus token included, but for the call's last one.
    known = ~feedback.overlap.isnan()
    assert known[:-1].all()
    assert torch.equal(feedback.overlap[known], (predicted == feedback.answer)[known].float())
    assert stats.accepted == int((feedback.outcome == ACCEPTED).sum())
    assert stats.tested == int((feedback.outcome != UNTESTED).sum())
    assert stats.rounds == int((feedback.outcome != ACCEPTED).sum()) + int(feedback.outcome[-1] == ACCEPTED)


def test_a_block_accepted_up_to_its_eos_is_not_read_as_a_rejection(target, serve):
    """num_matches undercounts there: the EOS is the draft's own, accepted."""
    plain = target.generate(PROMPT, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1)
    eos = int(plain[0, PROMPT.shape[1] + 2])  # the third new token, inside a block of 5
    output, feedback, stats = serve(target, eos_token_id=eos, pad_token_id=1)
    n = int((plain[0, PROMPT.shape[1] :] == eos).nonzero()[0]) + 1
    assert output.shape[1] == PROMPT.shape[1] + n
    assert feedback.outcome.tolist() == [ACCEPTED] * n
    assert (stats.accepted, stats.tested, stats.alpha_live) == (n, n, 1.0)


def test_length_limit_inside_a_draft(target, serve, noised_copy):
    for length in range(1, 9):
        plain = target.generate(PROMPT, max_new_tokens=length, do_sample=False)
        output, feedback, stats = serve(noised_copy(target, 0.1), max_new_tokens=length)
        assert torch.equal(plain, output)
        assert len(feedback) == stats.new_tokens == output.shape[1] - PROMPT.shape[1]


def test_the_target_runs_once_a_round_and_never_else(target, serve, noised_copy):
    calls, draft = [], noised_copy(target, 0.2)
    handle = target.register_forward_pre_hook(lambda module, inputs: calls.append(1))
    try:
        _, _, stats = serve(draft)
    finally:
        handle.remove()
    assert len(calls) == stats.rounds + stats.verification_forwards


class Biased(LogitsProcessor):
    """A user's processor, in place, as some are."""

    def __call__(self, input_ids, scores):
        scores[:, 7] += 3.0
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
def test_raw_distributions_are_captured_under_processors_and_sampling(target, serve, noised_copy, do_sample):
    """Processed scores hold -inf beyond top_k; a processor applied twice, or in place over the kept row, would show too."""
    torch.manual_seed(0)
    kwargs = {"do_sample": do_sample, "repetition_penalty": 1.3, "logits_processor": LogitsProcessorList([Biased()])}
    if do_sample:
        kwargs |= {"top_k": 5, "temperature": 0.7}
    output, feedback, stats = serve(noised_copy(target, 0.1), **kwargs)
    with torch.no_grad():
        log_p = target(output).logits[0, PROMPT.shape[1] - 1 : -1].log_softmax(-1)
    dense = torch.empty_like(log_p).scatter(-1, feedback.top_ids.long(), feedback.top_logps)
    torch.testing.assert_close(dense, log_p, atol=1e-4, rtol=1e-4)
    assert feedback.sampled == do_sample
    assert 0 < stats.alpha <= 1
    if do_sample:
        # q is what was sampled from: at most 5 tokens have any mass.
        tested = feedback.outcome != UNTESTED
        assert (feedback.draft_logps[tested].isfinite().sum(-1) <= 5).all()


def test_processors_leave_greedy_output_the_targets_own(target, serve, noised_copy):
    kwargs = {"repetition_penalty": 1.4, "no_repeat_ngram_size": 3, "min_new_tokens": 10, "max_new_tokens": 24}
    plain = target.generate(PROMPT, do_sample=False, **kwargs)
    output, _, _ = serve(noised_copy(target, 0.2), **kwargs)
    assert torch.equal(plain, output)


def test_left_padding_is_masked_for_the_draft_too(target, serve, noised_copy):
    padded = torch.cat([torch.ones(1, 3, dtype=torch.long), PROMPT], dim=-1)
    mask = torch.tensor([[0, 0, 0] + [1] * PROMPT.shape[1]])
    plain = target.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False)
    output, _, stats = serve(target, padded, attention_mask=mask)
    assert torch.equal(plain, output)
    assert stats.alpha_live == 1.0  # a draft that saw the padding would differ


def test_sampling_is_exact(target, noised_copy):
    """χ² of the first two tokens over 1,000 calls, against the target's own distribution of them. q that is not what was sampled from,
    or a residual not renormalised, fails it."""
    from itertools import product

    vocab = 8
    small = type(target)(type(target.config)(**{**target.config.to_dict(), "vocab_size": vocab, "eos_token_id": None}))
    small.eval()
    assistant = OnlineAssistant(noised_copy(small, 0.8), lookahead="constant", num_assistant_tokens=3, learn=False)
    prompt = torch.tensor([[2, 5, 3]])
    with torch.no_grad():
        first = small(prompt).logits[0, -1].softmax(-1)
        pairs = torch.stack([torch.cat([prompt[0], torch.tensor([a])]) for a in range(vocab)])
        second = small(pairs).logits[:, -1].softmax(-1)
    expected = first[:, None] * second
    counts = torch.zeros(vocab, vocab)
    torch.manual_seed(1)
    trials = 1000
    for _ in range(trials):
        # Three tokens, so that the second is drafted and not only a bonus.
        output = small.generate(
            prompt, max_new_tokens=4, do_sample=True, top_k=0, assistant_model=assistant, pad_token_id=0
        )
        counts[output[0, 3], output[0, 4]] += 1
    cells = [(a, b) for a, b in product(range(vocab), repeat=2) if expected[a, b] * trials >= 5]
    chi2 = sum((counts[c] - trials * expected[c]) ** 2 / (trials * expected[c]) for c in cells)
    freedom = len(cells) - 1
    # Wilson-Hilferty: the 1 - 1e-4 quantile (z = 3.72) of χ²; the draws are seeded, so this does not flake.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi2 < limit
    assert assistant.stats.total.accepted < assistant.stats.total.tested  # rejections took part


def test_sampled_alpha_is_the_overlap_of_what_both_were_sampled_from(target, serve, noised_copy):
    draft = noised_copy(target, 0.2)
    torch.manual_seed(3)
    output, feedback, _ = serve(draft, do_sample=True, top_k=0, temperature=0.8)
    with torch.no_grad():
        start = PROMPT.shape[1] - 1
        p = (target(output).logits[0, start:-1] / 0.8).softmax(-1)
        q = (draft(output).logits[0, start:-1] / 0.8).softmax(-1)
    known = ~feedback.overlap.isnan()
    assert known[:-1].all()
    torch.testing.assert_close(feedback.overlap[known], torch.minimum(p, q).sum(-1)[known], atol=1e-4, rtol=1e-4)


def test_a_sliding_window_draft_keeps_its_cache_right(tiny_llama, noised_copy):
    """A cache that is not cropped, or cropped by a wrong count, shows once the window is shorter than the text."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    target = MistralForCausalLM(config).eval()
    for draft in (target, noised_copy(target, 0.2)):
        assistant = OnlineAssistant(draft, lookahead="constant", num_assistant_tokens=4, learn=False)
        plain = target.generate(PROMPT, max_new_tokens=40, do_sample=False, pad_token_id=0)
        output = target.generate(PROMPT, max_new_tokens=40, do_sample=False, pad_token_id=0, assistant_model=assistant)
        assert torch.equal(plain, output)
        if draft is target:
            assert assistant.stats.last.alpha_live == 1.0


def test_rounds_without_a_draft_still_teach_and_the_draft_catches_up(target, noised_copy):
    """γ goes 0, 0, 0, 3, 0, 3, …: the draft's cache lags and must catch up in one forward."""
    draft = noised_copy(target, 0.1)
    settings = {"suffix_cache": False, "update_interval": 10**6, "top_k": 64, "feedback_dtype": "float32"}
    assistant = OnlineAssistant(draft, **settings)
    lengths = iter([0, 0, 0, 3, 0, 3, 3, 0, 0, 3] * 5)
    assistant.lookahead.plan = lambda *proposal, **can: Plan("draft", next(lengths))
    plain = target.generate(PROMPT, max_new_tokens=24, do_sample=False)
    output = target.generate(PROMPT, max_new_tokens=24, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, output)
    assistant.update()
    [feedback] = assistant.buffer.new()
    with torch.no_grad():
        predicted = draft(output).logits[0, PROMPT.shape[1] - 1 : -1].argmax(-1)
    known = ~feedback.overlap.isnan()
    assert known[:-1].all()
    assert torch.equal(feedback.overlap[known], (predicted == feedback.answer)[known].float())
    assert (feedback.outcome == REJECTED).sum() == assistant.stats.last.tested - assistant.stats.last.accepted


class Hearing(BaseStreamer):
    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        pass


@pytest.mark.parametrize("how", ["inference_mode", "streamer", "dict"])
def test_usual_ways_of_calling_generate(target, noised_copy, how):
    settings = {"lookahead": "constant", "update_interval": 1, "learning_rate": 1e-3, "learning_budget": 1.0}
    assistant = OnlineAssistant(noised_copy(target, 0.1), seed=0, **settings)
    plain = target.generate(PROMPT, max_new_tokens=12, do_sample=False)
    kwargs = {"max_new_tokens": 12, "do_sample": False, "assistant_model": assistant}
    for _ in range(3):  # learns in between, also of tensors made under inference_mode
        if how == "inference_mode":
            with torch.inference_mode():
                output = target.generate(PROMPT, **kwargs)
        elif how == "streamer":
            streamer = Hearing()
            output = target.generate(PROMPT, streamer=streamer, **kwargs)
            assert streamer.heard == output[0].tolist()
        else:
            result = target.generate(PROMPT, return_dict_in_generate=True, output_logits=True, **kwargs)
            output = result.sequences
            assert len(result.logits) == output.shape[1] - PROMPT.shape[1]
        assert torch.equal(plain, output)
    assert assistant.stats.updates == 2
    assert assistant.stats.failed_updates == 0


def test_before_the_targets_states_are_there_the_cache_drafts(tiny_llama):
    target = tiny_llama(layers=4)
    assistant = OnlineAssistant(grow_feature_draft(target, seed=0), learn=False, draft_cost=0.05)
    policy, rounds = assistant.lookahead, []
    policy.observe_untested([1.0] * 1000)  # as if this draft were always right
    assert policy.plan().source == "draft"
    observe = policy.observe_round

    def observe_round(drafted, *args, **kwargs):
        rounds.append((kwargs["steps"], kwargs["cached"]))
        observe(drafted, *args, **kwargs)

    policy.observe_round = observe_round
    for _ in range(2):
        first = len(rounds)
        target.generate(torch.tensor([[5, 9, 3]]), assistant_model=assistant, max_new_tokens=12, do_sample=False)
    steps, cached = rounds[first]
    assert steps == 0
    assert cached > 0
    assert any(steps for steps, _ in rounds[1:first]), "once they are there it drafts"


@pytest.mark.parametrize("learn", [False, True])
def test_states_that_neither_draft_nor_learner_reads_are_not_asked_for(tiny_llama, learn):
    target = tiny_llama(layers=4)
    settings = {"update_interval": 100} if learn else {"learn": False}
    assistant = OnlineAssistant(grow_feature_draft(target, seed=0), draft_cost=0.05, seed=0, **settings)
    assistant.lookahead.observe_untested([0.0] * 1000)  # as if this draft were never right
    asked = []
    hook = target.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(bool(kwargs.get("output_hidden_states"))), with_kwargs=True
    )
    prompt = torch.tensor([[5, 9, 3]])
    output = target.generate(prompt, assistant_model=assistant, max_new_tokens=12, do_sample=False)
    hook.remove()
    assert any(asked) == learn
    assert torch.equal(output, target.generate(prompt, max_new_tokens=12, do_sample=False))
