"""Logits processors and stopping criteria: plain decoding asks each once a token, in order, and so it must look to them here."""

import copy
import logging
import math
from itertools import pairwise, product

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    SynthIDTextWatermarkLogitsProcessor,
    WatermarkingConfig,
)

from hf_osd import OnlineAssistant
from hf_osd.feedback.feedback import ACCEPTED

from .models import one_layer
from .processors import (
    BUDGETS,
    END,
    LENGTH,
    STATEFUL,
    UNCOPIED,
    AfterCalls,
    AtLength,
    AtToken,
    Counting,
    Locking,
    Remembering,
    Sealed,
    Shifting,
    Watching,
    Writing,
    shifting,
)

PROMPTS = torch.randint(2, 64, (4, 1, LENGTH), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": 1, "pad_token_id": 1}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=2, eos_token_id=None)


@pytest.fixture(scope="module")
def draft(target, noised_copy):
    """Right about half of the time."""
    return noised_copy(target, 0.05)


@pytest.fixture(scope="module")
def answers(target):
    """What the target says when nothing interferes, a list of tokens a prompt."""
    return [target.generate(p, **{**GREEDY, "eos_token_id": None})[0, LENGTH:].tolist() for p in PROMPTS]


def assist(draft, **config):
    return OnlineAssistant(draft, **{"lookahead": "constant", "update_interval": 10**6, **config})


def processors(processor):
    return {"logits_processor": LogitsProcessorList([processor])}


# Stock processors.

STOCK = {
    "repetition_penalty": lambda a, n: {"repetition_penalty": 1.5},
    "encoder_repetition_penalty": lambda a, n: {"encoder_repetition_penalty": 3.0},
    "no_repeat_ngram_size": lambda a, n: {"no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_size": lambda a, n: {"encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[a[0]]]},
    "bad_words_ids": lambda a, n: {"bad_words_ids": [[a[3]], [a[6], a[7]]]},
    "sequence_bias": lambda a, n: {"sequence_bias": [[[a[4]], -9.0], [[a[1], n], 25.0]]},
    "suppress_tokens": lambda a, n: {"suppress_tokens": [a[2], a[8]]},
    "begin_suppress_tokens": lambda a, n: {"begin_suppress_tokens": [a[0]]},
    "forced_eos_token_id": lambda a, n: {"forced_eos_token_id": n},
    "min_new_tokens": lambda a, n: {"min_new_tokens": 8, "eos_token_id": a[2]},
    "exponential_decay_length_penalty": lambda a, n: {"exponential_decay_length_penalty": (3, 2.0)},
    "prefix_allowed_tokens_fn": lambda a, n: {
        "prefix_allowed_tokens_fn": lambda batch, ids: [t for t in range(2, 64) if (t + len(ids)) % 3]
    },
    "watermarking_config": lambda a, n: {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")},
    "together": lambda a, n: {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "suppress_tokens": [a[2]], "min_new_tokens": 9,
        "renormalize_logits": True, "remove_invalid_values": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STOCK)
def test_stock_processors(target, draft, answers, name):
    assistant, bites = assist(draft), []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        never_said = next(t for t in range(2, 64) if t not in answer)
        kwargs = {**GREEDY, **STOCK[name](answer, never_said)}
        plain = target.generate(prompt, **kwargs)
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **kwargs))
        bites.append(plain[0, LENGTH:].tolist() != answer)
    assert any(bites)
    assert 0 < assistant.stats.total.accepted < assistant.stats.total.tested


def test_a_forced_first_token(target, draft):
    assistant, prompt = assist(draft), torch.tensor([[5]])
    kwargs = {**GREEDY, "forced_bos_token_id": 9}
    plain = target.generate(prompt, **kwargs)
    assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **kwargs))
    assert plain[0, 1] == 9
    assert assistant.stats.total.accepted > 0


# A user's own processors.


@pytest.mark.parametrize("processor", [Shifting(), Writing(), shifting], ids=["out of place", "in place", "function"])
def test_a_users_own_processor_without_state(target, draft, answers, processor):
    assistant = assist(draft)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        plain = target.generate(prompt, **GREEDY, **processors(processor))
        assert plain[0, LENGTH:].tolist() != answer
        assert torch.equal(
            plain, target.generate(prompt, assistant_model=assistant, **GREEDY, **processors(processor))
        )
    if processor is not shifting:  # of whose state nothing can be known
        assert 0 < assistant.stats.total.accepted < assistant.stats.total.tested


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_a_users_own_processor_with_state(target, noised_copy, answers, kind, scale):
    """Its state goes on from call to call, and ends where plain decoding's ends."""
    assistant = assist(noised_copy(target, scale))
    own, ours = kind(), kind()
    for prompt, answer in zip(PROMPTS[:2], answers, strict=False):
        plain = target.generate(prompt, **GREEDY, **processors(own))
        assert plain[0, LENGTH:].tolist() != answer
        output = target.generate(prompt, assistant_model=assistant, **GREEDY, **processors(ours))
        assert torch.equal(plain, output)
        assert ours.state() == own.state()


def test_state_ends_right_where_an_eos_cuts_a_block(target, answers):
    """The rows behind it were processed and thrown away."""
    assistant = assist(target)
    for prompt in PROMPTS:
        unstopped = target.generate(prompt, **GREEDY, **processors(Remembering()))[0, LENGTH:].tolist()
        kwargs = {**GREEDY, "eos_token_id": unstopped[3]}
        own, ours = Remembering(), Remembering()
        plain = target.generate(prompt, **kwargs, **processors(own))
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **kwargs, **processors(ours)))
        assert ours.seen == own.seen
        assert len(own.seen) <= 4


def test_a_synthid_watermark(target, draft, answers):
    """Stock, and with state: the context it has seen. Greedy, so that one run says all."""
    keys = {"ngram_len": 3, "keys": [654, 400, 836]}
    sizes = {"sampling_table_size": 2**10, "sampling_table_seed": 0, "context_history_size": 32, "device": "cpu"}
    assistant = assist(draft)
    for prompt, answer in zip(PROMPTS[:2], answers, strict=False):
        configured = {**GREEDY, "watermarking_config": SynthIDTextWatermarkingConfig(**keys)}
        plain = target.generate(prompt, **configured)
        assert plain[0, LENGTH:].tolist() != answer
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **configured))
        own, ours = (SynthIDTextWatermarkLogitsProcessor(**keys, **sizes) for _ in range(2))
        plain = target.generate(prompt, **GREEDY, **processors(own))
        output = target.generate(prompt, assistant_model=assistant, **GREEDY, **processors(ours))
        assert torch.equal(plain, output)
        assert ours.state.num_calls == own.state.num_calls == GREEDY["max_new_tokens"]
        assert torch.equal(ours.state.context, own.state.context)
        assert torch.equal(ours.state.context_history, own.state.context_history)


@pytest.mark.parametrize("kind", [Counting, Sealed])
def test_sampling_under_a_stateful_processor_is_exact(noised_copy, kind):
    """χ² of the second and third tokens against the distribution by enumeration: every path has its own processor."""
    vocab, trials = 6, 500
    small = one_layer(vocab)
    assistant = assist(noised_copy(small, 0.5), learn=False)
    prompt, soften = torch.tensor([2, 5, 3]), 0.3  # else five logits up would leave no other token a chance

    with torch.no_grad():
        paths = torch.tensor(list(product(range(vocab), repeat=2)))
        logits = small(torch.cat([prompt.expand(len(paths), -1), paths], dim=-1)).logits[:, len(prompt) - 1 :]
    expected = torch.zeros(vocab, vocab)
    for path, rows in zip(paths, logits, strict=True):
        processor, p = kind(), []
        for i in range(3):
            prefix = torch.cat([prompt, path[:i]])[None]
            p.append((processor(prefix, rows[i : i + 1].clone())[0] * soften).softmax(-1))
        expected[path[1]] += p[0][path[0]] * p[1][path[1]] * p[2]
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))

    torch.manual_seed(0)
    counts = torch.zeros(vocab, vocab)
    kwargs = {"max_new_tokens": 3, "do_sample": True, "top_k": 0, "temperature": 1 / soften}
    for _ in range(trials):
        output = small.generate(prompt[None], assistant_model=assistant, **kwargs, **processors(kind()))
        counts[output[0, -2], output[0, -1]] += 1
    cells = expected * trials >= 5
    chi2 = float(((counts - trials * expected)[cells] ** 2 / (trials * expected)[cells]).sum())
    freedom = int(cells.sum()) - 1
    # Wilson-Hilferty: the 1 - 1e-4 quantile (z = 3.72) of χ²; the draws are seeded, so this does not flake.
    assert chi2 < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    total = assistant.stats.total
    assert kind is Sealed or 0 < total.accepted < total.tested


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", BUDGETS)
def test_what_a_processor_knows_is_plain_decodings_wherever_it_lies(target, draft, kind, sampled):
    """END comes at its place, from a draft, from the suffix cache alone, and with both."""
    kwargs = {**GREEDY, "do_sample": sampled}
    torch.manual_seed(0)
    for assistant in (
        assist(draft, learn=False, suffix_cache=False),
        OnlineAssistant(lookahead="constant"),
        assist(draft, learn=False, lookahead="cost", draft_cost=0.01),
    ):
        for prompt in PROMPTS.repeat(2, 1, 1):
            output = target.generate(prompt, assistant_model=assistant, **kwargs, **processors(kind()))
            assert (output[0, LENGTH:] == END).nonzero().flatten().tolist() == [6]


@pytest.mark.parametrize("kind", UNCOPIED)
def test_sampling_through_what_cannot_be_copied_is_plain_from_then_on_and_says_so_once(target, draft, kind, caplog):
    assistant = assist(draft, learn=False)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        for prompt in PROMPTS[:2]:
            kwargs = {**GREEDY, "do_sample": True}
            target.generate(prompt, assistant_model=assistant, **kwargs, **processors(kind()))
    said = [r.message for r in caplog.records if r.name.startswith("hf_osd") and "cannot be copied" in r.message]
    assert len(said) == 1
    assert kind.__name__ in said[0]
    assert "nothing more is drafted in calls that sample" in said[0]
    rounds = assistant.stats.last.rounds
    assert rounds > GREEDY["max_new_tokens"] - 7 if kind is Locking else rounds >= GREEDY["max_new_tokens"] - 5


def test_a_processor_that_is_soon_sealed_is_drafted_for_until_then(target, draft):
    assistant = assist(draft, learn=False, num_assistant_tokens=2)
    torch.manual_seed(0)
    target.generate(PROMPTS[0], assistant_model=assistant, **{**GREEDY, "do_sample": True}, **processors(Locking()))
    last = assistant.stats.last
    assert 0 < last.drafted <= 4
    assert last.rounds > 8


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_function_of_allowed_tokens_is_asked_about_what_it_allowed_alone(target, draft, sampled):
    """A trie: no word begins with a token that it has not."""
    follows = {token: [2 + (token * k) % 60 for k in (3, 5, 7)] for token in range(64)}

    def allowed(batch, tokens):
        answer = tokens[LENGTH:].tolist()
        if any(b not in follows[a] for a, b in pairwise(answer)):
            return []  # which generate takes for an error
        return follows[int(tokens[-1])]

    kwargs = {**GREEDY, "do_sample": sampled, "prefix_allowed_tokens_fn": allowed}
    torch.manual_seed(0)
    for assistant in (assist(draft, learn=False), OnlineAssistant(lookahead="constant")):
        if not assistant.lookahead.has_draft:  # it proposes what was said before, which is not allowed here
            target.generate(PROMPTS[0], assistant_model=assistant, **GREEDY)
        for prompt in PROMPTS:
            output = target.generate(prompt, assistant_model=assistant, **kwargs)
            if not sampled:
                assert torch.equal(output, target.generate(prompt, **kwargs))
        assert assistant.stats.total.tested > 0


@pytest.mark.parametrize("kind", [Counting, Writing])
def test_scores_are_plain_decodings_where_the_draw_was_made_for_generate(target, draft, kind):
    """Each token's own processed row, from the text before it."""
    assistant = assist(draft, learn=False)
    kwargs = {**GREEDY, "do_sample": True, "top_k": 0, "output_scores": True, "return_dict_in_generate": True}
    torch.manual_seed(0)
    output = target.generate(PROMPTS[0], assistant_model=assistant, **kwargs, **processors(kind()))
    with torch.no_grad():
        rows = target(output.sequences).logits[0, LENGTH - 1 : -1].float()
    again = kind()
    for i, (scores, row) in enumerate(zip(output.scores, rows, strict=True)):
        torch.testing.assert_close(scores, again(output.sequences[:, : LENGTH + i], row[None].clone()))
    assert assistant.stats.total.accepted > 0


# Stop strings.


@pytest.mark.parametrize("scale", [0.0, 0.05])
@pytest.mark.parametrize("words", [1, 2])
def test_stop_strings_in_the_middle_of_a_block(target, noised_copy, tokenizer, answers, scale, words):
    """Stock assisted generation looks for them once a round, at its end, and runs past them."""
    assistant, found = assist(noised_copy(target, scale)), 0
    kwargs = {**GREEDY, "tokenizer": tokenizer}
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        target.generate(prompt, assistant_model=assistant, **GREEDY)
        assistant.update()
        outcome = assistant.buffer.new()[-1].outcome.tolist()
        # An accepted draft does not end its round: the token after it was verified along with it.
        inside = [i for i in range(2, len(answer) - 1) if outcome[i] == ACCEPTED and answer[i] not in answer[:i]]
        for i in inside[:2]:
            stop = tokenizer.decode(answer[i - words + 1 : i + 1])
            plain = target.generate(prompt, stop_strings=[stop, "xa abcdef"], **kwargs)
            assert plain[0, LENGTH:].tolist() == answer[: i + 1]
            output = target.generate(prompt, stop_strings=[stop, "xa abcdef"], assistant_model=assistant, **kwargs)
            assert torch.equal(plain, output)
            assert assistant.stats.last.drafted > 0
            found += 1
    assert found >= 3


def test_sampled_text_ends_at_its_first_stop_string(target, draft, tokenizer):
    assistant, ended = assist(draft), 0
    stops = [tokenizer.decode(i) for i in range(2, 10)]
    kwargs = {"max_new_tokens": 14, "do_sample": True, "top_k": 20, "stop_strings": stops, "tokenizer": tokenizer}
    torch.manual_seed(0)
    for prompt in PROMPTS.repeat(3, 1, 1):
        answer = target.generate(prompt, assistant_model=assistant, pad_token_id=0, **kwargs)[0, LENGTH:].tolist()
        stopping = [t in range(2, 10) for t in answer]
        assert not any(stopping[:-1])
        assert stopping[-1] or len(answer) == 14
        ended += stopping[-1]
    assert ended >= 4


def test_stop_strings_that_never_come(target, draft, tokenizer):
    assistant, kwargs = assist(draft), {**GREEDY, "stop_strings": "xa abcdef", "tokenizer": tokenizer}
    for prompt in PROMPTS:
        plain = target.generate(prompt, **kwargs)
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **kwargs))
    assert 0 < assistant.stats.total.accepted < assistant.stats.total.tested


# Stopping criteria.


@pytest.mark.parametrize("kind", [AtLength, AtToken, AfterCalls, Watching])
def test_a_users_own_criteria_are_asked_once_a_token(target, caplog, kind):
    """generate asks them once a round, so that a round must be a token: nothing is drafted, and that is said once."""
    assistant = assist(target)
    own, ours = kind(), kind()
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        for prompt in PROMPTS:
            plain = target.generate(prompt, stopping_criteria=StoppingCriteriaList([own]), **GREEDY)
            criteria = StoppingCriteriaList([ours])
            output = target.generate(prompt, stopping_criteria=criteria, assistant_model=assistant, **GREEDY)
            assert torch.equal(plain, output)
            assert ours.state() == own.state()
            assert assistant.stats.last.drafted == 0
            assert assistant.stats.last.new_tokens == plain.shape[1] - LENGTH
    assert len([r for r in caplog.records if r.name.startswith("hf_osd") and "criteria" in r.message]) == 1
    target.generate(PROMPTS[0], assistant_model=assistant, **GREEDY)
    assert assistant.stats.last.drafted > 0  # again without them


def test_stock_criteria_passed_by_hand(target, tokenizer, answers):
    """In place of those that generate makes itself: its own cuts of a block know nothing of them."""
    assistant = assist(target)
    for prompt, answer in zip(PROMPTS[:2], answers, strict=False):
        for criterion in (
            MaxLengthCriteria(LENGTH + 3),
            EosTokenCriteria(answer[2]),
            StopStringCriteria(tokenizer=tokenizer, stop_strings=[tokenizer.decode(answer[2:3])]),
        ):
            kwargs = {**GREEDY, "stopping_criteria": StoppingCriteriaList([criterion])}
            plain = target.generate(prompt, **kwargs)
            assert plain.shape[1] <= LENGTH + 3
            assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **kwargs))


def test_a_time_limit_far_away_still_drafts(target, draft):
    assistant = assist(draft)
    for prompt in PROMPTS[:2]:
        plain = target.generate(prompt, **GREEDY)
        assert torch.equal(plain, target.generate(prompt, max_time=60.0, assistant_model=assistant, **GREEDY))
        assert assistant.stats.last.drafted > 0


def test_the_callers_own_lists_are_left_as_they_were(target, draft):
    """Whatever is wrapped or put in front for the call's sake."""
    mine = LogitsProcessorList([Counting(), Writing()])
    criteria = StoppingCriteriaList([AtLength()])
    before = copy.copy(mine), copy.copy(criteria)
    assistant = assist(draft)
    kwargs = {**GREEDY, "logits_processor": mine, "stopping_criteria": criteria}
    target.generate(PROMPTS[0], assistant_model=assistant, **kwargs)
    assert list(mine) == list(before[0])
    assert list(criteria) == list(before[1])
