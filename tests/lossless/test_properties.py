"""For any γ, policy, prompt, draft, end and processor: output, rounds, counts and feedback are those of the plain reference in reference.py."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hf_osd.policy.lookahead import Plan

from .checks import assistant_of, check_greedy, check_padded, check_sampled
from .processors import Biased

VOCAB = 16  # few, so that an end of sequence is often said, and processors often bite

# What is drawn is small as it is, and shrinking it further would take minutes.
unshrunk = settings(phases=[Phase.explicit, Phase.generate])
many = settings(unshrunk, max_examples=80)


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(vocab=VOCAB, bos_token_id=None, eos_token_id=None, pad_token_id=0)


drafts = st.tuples(st.sampled_from([0.0, 0.1, 0.3, 1.0]), st.integers(0, 10**6))
prompts = st.tuples(st.integers(1, 10), st.integers(0, 10**6))
configs = st.fixed_dictionaries(
    {"num_assistant_tokens": st.integers(1, 6), "top_k": st.sampled_from([VOCAB, 4])},
    optional={
        "lookahead": st.sampled_from(["heuristic", "cost"]),
        "draft_cost": st.sampled_from([0.05, 0.4]),
        "verify_cost": st.sampled_from([0.0, 0.1]),
    },
)
lengths = st.integers(1, 20)
ends = st.lists(st.integers(0, VOCAB - 1), max_size=3, unique=True)
processing = st.fixed_dictionaries(
    {}, optional={"repetition_penalty": st.sampled_from([0.8, 1.3]), "min_new_tokens": st.integers(1, 6)}
)
sampling = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.6, 1.0, 1.5]), "top_k": st.sampled_from([0, 3, 10])},
    optional={"top_p": st.just(0.9)},
)
in_place = st.sampled_from([(), (Biased(),)])


def prompt_of(drawn):
    length, seed = drawn
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def costs(config):
    """ "cost" with measured times would choose by the clock."""
    return {"draft_cost": 0.1, **config} if config.get("lookahead") == "cost" else config


@many
@given(drafts, prompts, configs, lengths, ends, processing, in_place)
def test_greedy(target, noised_copy, draft, prompt, config, n, eos, processors, extra):
    draft = noised_copy(target, *draft)
    check_greedy(target, draft, prompt_of(prompt), n, eos, extra, costs(config), alpha_at="tested", **processors)


@unshrunk
@given(drafts, prompts, st.integers(1, 4), lengths, processing, in_place)
def test_greedy_alpha_is_of_what_was_asked_of_both(target, noised_copy, draft, prompt, gamma, n, processors, extra):
    """Also at positions where nothing was drafted, and that were scored later: through the processors, or not at all."""
    config = {"num_assistant_tokens": gamma}
    check_greedy(target, noised_copy(target, *draft), prompt_of(prompt), n, (), extra, config, **processors)


@many
@given(drafts, prompts, configs, lengths, ends, processing, sampling, in_place, st.integers(0, 10**6))
def test_sampled(target, noised_copy, draft, prompt, config, n, eos, processors, warpers, extra, seed):
    draft = noised_copy(target, *draft)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        check_sampled(target, draft, prompt_of(prompt), n, eos, extra, costs(config), **processors, **warpers)


@unshrunk
@given(drafts, prompts, st.integers(1, 5), st.integers(1, 6), st.booleans())
def test_left_padding_is_nothing_to_the_draft(target, noised_copy, draft, prompt, padding, gamma, do_sample):
    check_padded(target, noised_copy(target, *draft), prompt_of(prompt), padding, gamma, do_sample)


@unshrunk
@given(st.lists(st.integers(0, 3), min_size=8, max_size=8), drafts, prompts)
def test_rounds_without_a_draft(target, noised_copy, wished, draft, prompt):
    """The draft lags behind, and must catch up on all of it when it is asked again."""
    draft, prompt = noised_copy(target, *draft), prompt_of(prompt)
    assistant = assistant_of(draft)
    wished = iter(wished * 3)
    assistant.lookahead.plan = lambda *proposal, **can: Plan("draft", next(wished))
    check_greedy(target, draft, prompt, 16, assistant=assistant)


@unshrunk
@given(drafts, prompts, st.integers(1, 6), st.lists(st.integers(1, 12), min_size=2, max_size=4))
def test_calls_one_after_the_other_do_not_mix(target, noised_copy, draft, prompt, gamma, lengths):
    """One assistant, prompts that begin alike: nothing of a call is left in the next."""
    draft, assistant = (
        noised_copy(target, *draft),
        assistant_of(noised_copy(target, *draft), num_assistant_tokens=gamma),
    )
    for n in lengths:
        check_greedy(target, draft, prompt_of(prompt), n, assistant=assistant)
    assert assistant.stats.total.requests == len(lengths)
    assert assistant.stats.total.new_tokens == sum(lengths)
