"""Chats: one cache goes from call to call, and each call gets the whole conversation. Tokens are those of plain decoding with such a cache, and of a call without one; the
target reads what is new and nothing else; the cache is afterwards as plain decoding leaves it; and the draft is taught what it would have been without the cache."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache
from transformers.generation.streamers import BaseStreamer

import hf_osd
from hf_osd import OnlineAssistant, grow_draft, grow_feature_draft
from hf_osd.generation.filled_cache import emptied
from hf_osd.generation.patch import _unsuited, generate_unpatched
from hf_osd.generation.request import GenerateRequest
from hf_osd.generation.running import RunningCall
from recipes.checks.recurrent import model_of

from .checks import SERVES_AT_ONCE
from .feature_drafts import check_drafted, states_of

ATTENTION = ["Llama", "GPT2", "Mistral"]  # Mistral's window is shorter than a turn
RECURRENT = ["Qwen3_5ForCausalLM", "FalconH1ForCausalLM", "KimiLinearForCausalLM"]
N = 14  # tokens of an answer
_made = {}


@pytest.fixture(scope="module")
def targets(tiny_model):
    """`targets(name)`: a model of four layers."""

    def make(name):
        if name not in _made:
            _made[name] = tiny_model(name, layers=4) if name in ATTENTION else model_of(name)
        return _made[name]

    return make


def cache_of(target):
    return DynamicCache(config=target.config.get_text_config(decoder=True))


def assistant_of(draft=None, **config):
    settings = {
        "lookahead": "constant",
        "num_assistant_tokens": 3,
        "seed": 0,
        "top_k": 64,
        **SERVES_AT_ONCE,
    }
    settings |= {"feedback_dtype": "float32", "learning_rate": 5e-3, "update_interval": 1, "verify_target": False}
    return OnlineAssistant(draft, **settings | config)


def turns_of(*lengths, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 60, (1, length), generator=random) for length in lengths]


@dataclass
class Turn:
    """One turn: the conversation after it `(1, L)`, how many tokens each forward of the target read, and what the cache held before and holds now."""

    text: torch.Tensor
    fed: list[int]
    held: int
    tensors: list[torch.Tensor]
    output: object


def contents(cache) -> list[torch.Tensor]:
    """All that a cache holds, and what the next call goes by."""
    found = []
    for layer in cache.layers:
        states = [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        states += [getattr(layer, "keys", None), getattr(layer, "values", None)]
        found += [state.clone() for state in states if state is not None]
        found.append(torch.tensor([getattr(layer, "record_past", 0.0), getattr(layer, "cumulative_length", 0.0)]))
    return found


def chat(target, turns, assistant=None, cache=None, assistants=None, **asked) -> list[Turn]:
    """A chat of these turns: plainly, or with an assistant. `assistants` has one for each turn, `None` for plain decoding."""
    text, fed, done = torch.zeros(1, 0, dtype=torch.long), [], []

    def count(module, args, kwargs):
        read = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
        fed.append(read.shape[1])

    hook = target.register_forward_pre_hook(count, with_kwargs=True)
    try:
        for i, turn in enumerate(turns):
            text = torch.cat([text, turn], dim=-1)
            given = {
                "attention_mask": torch.ones_like(text),
                "max_new_tokens": N,
                "do_sample": False,
                "pad_token_id": 0,
                **asked,
            }
            held = 0 if cache is None else cache.get_seq_length()
            if cache is not None:
                given["past_key_values"] = cache
            output = target.generate(text, assistant_model=assistants[i] if assistants else assistant, **given)
            text = getattr(output, "sequences", output)
            done.append(Turn(text, [*fed], held, [] if cache is None else contents(cache), output))
            fed.clear()
    finally:
        hook.remove()
    return done


def close(ours: list[torch.Tensor], plain: list[torch.Tensor]):
    """Two caches hold the same, within rounding."""
    assert len(ours) == len(plain)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def compare(ours: list[Turn], plain: list[Turn]):
    for one, own in zip(ours, plain, strict=True):
        assert one.text.tolist() == own.text.tolist()
        close(one.tensors, own.tensors)


def check(target, assistant, turns, caches=cache_of, **asked) -> list[Turn]:
    """A chat with a new `assistant` is plain decoding's, turn by turn; returns it."""
    ours = chat(target, turns, assistant, caches(target), **asked)
    compare(ours, chat(target, turns, cache=caches(target), **asked))
    alone = chat(target, turns, **asked)
    assert [turn.text.tolist() for turn in ours] == [turn.text.tolist() for turn in alone]
    total = assistant.stats.total
    assert sum(len(turn.fed) for turn in ours) == total.rounds + total.completing_forwards
    assert total.plain_requests == 0
    return ours


def check_fed(assistant, turns: list[Turn]):
    """The target has read, of the chat's tokens, each once, but for drafts that were rejected and what was read again. (Of answers that end at their limit.)"""
    total = assistant.stats.total
    new = sum(turn.text.shape[1] - 1 - turn.held for turn in turns)
    assert sum(map(sum, (turn.fed for turn in turns))) == new + total.drafted - total.accepted + total.refed_tokens


DRAFTS = {
    "cache alone": lambda target: None,
    "grown": grow_draft,
    "feature": lambda target: grow_feature_draft(target, seed=0),
}


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", ATTENTION)
def test_a_chat_is_plain_decodings(targets, name, kind):
    target = targets(name)
    assistant = assistant_of(DRAFTS[kind](target))
    turns = check(target, assistant, turns_of(1, 5, 9))
    check_fed(assistant, turns)
    total = assistant.stats.total
    assert 0 < total.tested <= total.drafted
    assert total.refed_tokens == total.completing_forwards == 0
    if kind != "cache alone":
        assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 0)


@pytest.mark.parametrize("kind", ["cache alone", "feature"])
@pytest.mark.parametrize("name", RECURRENT)
def test_a_chat_with_a_recurrent_target_is_plain_decodings(targets, name, kind):
    """Also with turns shorter than the window of its convolutions, from the first one on."""
    target = targets(name)
    assistant = assistant_of(DRAFTS[kind](target))
    check_fed(assistant, check(target, assistant, turns_of(1, 5, 2)))
    assert assistant.stats.total.refed_tokens > 0
    assert assistant.stats.failed_updates == 0


@settings(max_examples=3)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3),
    st.integers(1, 5),
    st.sampled_from([None, *range(3, 60, 7)]),
    st.integers(0, 9),
)
@example([1, 1, 1], 5, None, 0)
def test_turns_of_any_length_that_end_anywhere(targets, lengths, gamma, eos, seed):
    for name in ("Mistral", "Qwen3_5ForCausalLM"):
        assistant = assistant_of(num_assistant_tokens=gamma)
        check(targets(name), assistant, turns_of(*lengths, seed=seed), eos_token_id=eos)


@pytest.mark.parametrize("name", RECURRENT)
def test_what_is_carried_when_an_answer_ends_is_read_for_a_cache_that_is_kept(targets, name):
    """An answer that ends in place of a rejected draft leaves its block's verified tokens unread."""
    target, draft, completed, turns = targets(name), grow_feature_draft(targets(name), seed=0), 0, turns_of(6, 3)
    answer = target.generate(turns[0], max_new_tokens=N, do_sample=False)[0, 6:].tolist()
    for eos in [token for i, token in enumerate(answer) if i > 2 and token not in answer[:i]][:3]:
        first, second = assistant_of(draft, learn="off"), assistant_of(draft, learn="off")
        ours = chat(target, turns, assistants=[first, second], cache=cache_of(target), eos_token_id=eos)
        compare(ours, chat(target, turns, cache=cache_of(target), eos_token_id=eos))
        before = first.stats.total.completing_forwards
        assert len(ours[0].fed) == first.stats.total.rounds + before
        if before:
            check_fed(first, ours[:1])
        # Nothing of it where no one gets the cache.
        target.generate(turns[0], assistant_model=first, max_new_tokens=N, do_sample=False, eos_token_id=eos)
        assert first.stats.total.completing_forwards == before
        completed += before
    assert completed > 1


@pytest.mark.parametrize("name", ["Llama", "Qwen3_5ForCausalLM"])
@pytest.mark.parametrize("order", ["plain first", "plain between", "plain last"])
def test_plain_turns_may_come_between(targets, name, order):
    target, assistant = targets(name), assistant_of()
    assistants = {
        "plain first": [None, assistant, assistant],
        "plain between": [assistant, None, assistant],
        "plain last": [assistant, assistant, None],
    }
    turns = turns_of(2, 5, 3)
    ours = chat(target, turns, assistants=assistants[order], cache=cache_of(target))
    compare(ours, chat(target, turns, cache=cache_of(target)))
    assert assistant.stats.total.tested > 0


@pytest.mark.parametrize("name", ["Mistral", "FalconH1ForCausalLM"])
def test_caches_of_other_makes(targets, name):
    """One that is made without a config, where a model can have such; and the one that the call before has returned."""
    target = targets(name)
    if name == "Mistral":
        check(target, assistant_of(), turns_of(6, 5, 9), caches=lambda _: DynamicCache())
    asked = {"max_new_tokens": N, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    caches, texts = [None, None], [torch.zeros(1, 0, dtype=torch.long)] * 2
    for turn in turns_of(6, 5, 9):
        for i, assistant in enumerate((None, assistant_of())):
            given = {} if caches[i] is None else {"past_key_values": caches[i]}
            output = target.generate(torch.cat([texts[i], turn], -1), assistant_model=assistant, **asked, **given)
            texts[i], caches[i] = output.sequences, output.past_key_values
        assert texts[0].tolist() == texts[1].tolist()
        close(*map(contents, caches))


@pytest.mark.parametrize("name", ["Llama", "Qwen3_5ForCausalLM"])
def test_padding_stays_where_it_was(targets, name):
    target, asked = targets(name), {"max_new_tokens": N, "do_sample": False, "pad_token_id": 0}
    texts, mask = [torch.zeros(1, 3, dtype=torch.long)] * 2, torch.zeros(1, 3, dtype=torch.long)
    caches, assistant = [cache_of(target), cache_of(target)], assistant_of(grow_feature_draft(target, seed=0))
    for turn in turns_of(6, 5):
        mask = torch.cat([mask, torch.ones_like(turn)], -1)
        held = caches[0].get_seq_length()
        for i, one in enumerate((None, assistant)):
            given = {"attention_mask": mask, "past_key_values": caches[i], "assistant_model": one}
            texts[i] = target.generate(torch.cat([texts[i], turn], -1), **asked, **given)
        assert texts[0].tolist() == texts[1].tolist()
        close(*map(contents, caches))
        assistant.collect()
        feedback = assistant.buffer.requests()[-1]
        assert feedback.tokens.tolist() == texts[0][0, 3:].tolist()
        assert feedback.states.start == max(held - 3, 0)
        check_states(target, feedback)
        mask = torch.cat([mask, torch.ones(1, N, dtype=torch.long)], -1)


def test_embeddings_of_the_whole_conversation(targets):
    target, asked = targets("Llama"), {"max_new_tokens": N, "do_sample": False, "pad_token_id": 0}
    texts, caches, assistant = [torch.zeros(1, 0, dtype=torch.long)] * 2, [cache_of(target) for _ in range(2)], None
    assistant = assistant_of()
    for turn in turns_of(6, 5, 9):
        for i, one in enumerate((None, assistant)):
            text = torch.cat([texts[i], turn], -1)
            given = {"inputs_embeds": target.get_input_embeddings()(text), "past_key_values": caches[i]}
            texts[i] = target.generate(text, **given, assistant_model=one, **asked)
        assert texts[0].tolist() == texts[1].tolist()
        close(*map(contents, caches))
    assert assistant.stats.total.tested > 0


@pytest.mark.parametrize("name", ["Llama", "Qwen3_5ForCausalLM"])
def test_all_that_generate_returns_of_a_turn_is_plain_decodings(targets, name):
    target = copy.deepcopy(targets(name))
    target.set_attn_implementation("eager")
    names = ("logits", "scores", "hidden_states", "attentions")
    asked = {"return_dict_in_generate": True, **{f"output_{field}": True for field in names}}
    plain = chat(target, turns_of(6, 5, 9), cache=cache_of(target), **asked)
    ours = chat(target, turns_of(6, 5, 9), assistant_of(), cache_of(target), **asked)
    for one, own in zip(ours, plain, strict=True):
        for field in names:
            torch.testing.assert_close(one.output[field], own.output[field], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", [*ATTENTION, *RECURRENT])
def test_a_sampled_chats_logits_are_a_fresh_forwards(targets, noised_copy, name):
    target = targets(name)
    draft = noised_copy(target, 0.05) if name in ATTENTION else None
    asked = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "output_logits": True}
    assistant = assistant_of(draft)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for turn in chat(target, turns_of(9, 5, 9), assistant, cache_of(target), **asked):
            with torch.no_grad():
                fresh = target(turn.text[:, :-1]).logits[0, -N:]
            torch.testing.assert_close(torch.cat(turn.output.logits), fresh, atol=1e-2, rtol=1e-3)
    assert assistant.stats.total.tested > 0
    assert assistant.stats.total.accepted < assistant.stats.total.tested


@pytest.mark.parametrize("name", ["Llama", "Qwen3_5ForCausalLM"])
def test_the_suffix_cache_proposes_what_it_would_without_the_cache(targets, name):
    target, turns, stats = targets(name), turns_of(6, 5, 9), []
    for cache in (cache_of(target), None):
        chat(target, turns, assistant := assistant_of(), cache)
        stats.append(assistant.stats.total)
    one, other = stats
    assert (one.rounds, one.drafted, one.accepted) == (other.rounds, other.drafted, other.accepted)
    assert one.drafted > 0


# What a turn teaches.


def check_states(target, feedback):
    """The states that are kept are a fresh forward's, at their places, up to the last token that the target has read."""
    layers = grow_feature_draft(target).config.recorded_layers
    fresh = states_of(target, feedback.tokens[None].long(), layers)[0]
    kept = feedback.states
    assert kept.stop == len(feedback.tokens) - 1
    torch.testing.assert_close(kept.dense(), fresh[kept.start : -1], atol=float(fresh.abs().amax()) / 50, rtol=0)


def taught(target, draft, turns, cache, **config):
    """A chat in which nothing is learnt, with an assistant for each turn; what each turn taught, and its statistics."""
    assistants = [assistant_of(draft, update_interval=10**6, **config) for _ in turns]
    done = chat(target, turns, assistants=assistants, cache=cache)
    for assistant in assistants:
        assistant.collect()
    return done, [one.buffer.new()[0] for one in assistants], [one.stats.total for one in assistants]


def check_taught(target, draft, turns):
    """With the cache or without it a turn is drafted for alike, and teaches alike; but that a prompt teaches only from where the target has read it."""
    done, ours, stats = taught(target, draft, turns, cache_of(target))
    _, alone, others = taught(target, draft, turns, None)
    fields = ("tokens", "top_ids", "top_logps", "tail_logp", "drafted", "drafted_logp", "outcome", "overlap")
    near = {"atol": 1e-3, "rtol": 1e-3}
    for turn, feedback, fresh, one, other in zip(done, ours, alone, stats, others, strict=True):
        for name in fields:
            torch.testing.assert_close(getattr(feedback, name), getattr(fresh, name), **near, equal_nan=True)
        assert feedback.prompt_length == fresh.prompt_length
        assert (one.rounds, one.drafted_by, one.accepted_by) == (other.rounds, other.drafted_by, other.accepted_by)
        rows = feedback.prompt_length - 1 - turn.held
        assert (0 if feedback.prompt_rows is None else len(feedback.prompt_rows)) == rows
        if rows:
            torch.testing.assert_close(feedback.prompt_rows.top_logps, fresh.prompt_rows.top_logps[-rows:], **near)
    assert sum(one.drafted for one in stats) > 0


@pytest.mark.parametrize("name", ATTENTION)
def test_the_draft_reads_the_whole_conversation_and_is_taught_the_same(targets, noised_copy, name):
    check_taught(targets(name), noised_copy(targets(name), 0.05), turns_of(6, 1, 9))


@pytest.mark.parametrize("name", ["Qwen3_5ForCausalLM", "FalconH1ForCausalLM"])
def test_so_does_one_beside_a_recurrent_target(targets, tiny_llama, name):
    check_taught(targets(name), tiny_llama(bos_token_id=None, eos_token_id=None), turns_of(6, 1, 9))


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3_5ForCausalLM"])
def test_a_draft_that_reads_states_drafts_from_where_the_cache_ended(targets, name):
    """And the states from there on are kept."""
    target = targets(name)
    draft = grow_feature_draft(target, seed=0)
    done, kept, stats = taught(target, draft, turns_of(6, 1, 9), cache_of(target), suffix_cache=False)
    for turn, feedback, one in zip(done, kept, stats, strict=True):
        assert feedback.tokens.tolist() == turn.text[0].tolist()
        assert feedback.states.start == turn.held
        check_states(target, feedback)
        assert one.tested > 0
        check_drafted(target, draft, feedback, 3, first=turn.held)


def test_states_of_a_cut_prompt_begin_where_the_cache_ended_at_the_earliest(targets):
    """Also where the suffix cache drafts in the first round, whose states are not those of the text."""
    target, [one, other] = targets("Llama"), turns_of(6, 2)
    draft = grow_feature_draft(target, seed=0)
    costs = {"lookahead": "cost", "draft_cost": 0.05, "verify_cost": 0.01}
    done, kept, _ = taught(target, draft, [one, other, one], cache_of(target), prompt_positions=3, **costs)
    assert len(done[2].fed) > 1
    assert done[2].fed[0] > done[2].text.shape[1] - N - done[2].held, "a draft was read in the first round"
    for turn, feedback in zip(done, kept, strict=True):
        assert feedback.states.start == max(turn.held, feedback.prompt_length - 5)
        check_states(target, feedback)


# What goes on beside.


@pytest.mark.parametrize("name", ["Llama", "Qwen3_5ForCausalLM"])
def test_the_trial_is_made_on_an_empty_copy(targets, name):
    """It is made at the first block, here in a turn with a filled cache, which it leaves alone."""
    target = copy.deepcopy(targets(name))  # of which nothing is known yet
    assistant, turns = assistant_of(verify_target=True), turns_of(6, 5, 9)
    ours = chat(target, turns, assistants=[None, assistant, assistant], cache=cache_of(target))
    compare(ours, chat(target, turns, cache=cache_of(target)))
    total = assistant.stats.total
    assert total.verification_forwards > 0
    assert total.plain_requests == 0
    assert total.tested > 0


@pytest.mark.parametrize("name", [*ATTENTION, *RECURRENT])
def test_an_empty_copy_holds_nothing_and_leaves_the_cache_as_it_was(targets, name):
    target, [text] = targets(name), turns_of(9)
    cache = filled(target, 9)
    before = contents(cache)
    with torch.no_grad():
        other = emptied(cache)
        assert other.get_seq_length() == 0
        assert [type(layer) for layer in other.layers] == [type(layer) for layer in cache.layers]
        again = target(text, past_key_values=other).logits
        torch.testing.assert_close(again, target(text, past_key_values=cache_of(target)).logits)
    close(contents(cache), before)


def test_a_call_of_the_hubs_strategy_goes_on_too(targets):
    target, turns = targets("Qwen3_5ForCausalLM"), turns_of(6, 5, 9)
    plain, assistant, cache = chat(target, turns, cache=cache_of(target)), assistant_of(), cache_of(target)
    asked = {"max_new_tokens": N, "do_sample": False, "past_key_values": cache, "pad_token_id": 0}
    hf_osd.disable()
    try:
        text = torch.zeros(1, 0, dtype=torch.long)
        for turn, own in zip(turns, plain, strict=True):
            text = generate_unpatched(target, assistant, inputs=torch.cat([text, turn], -1), **asked)
            assert text.tolist() == own.text.tolist()
    finally:
        hf_osd.enable()
    assert assistant.stats.total.tested > 0


def test_a_quantised_cache_goes_on_plainly(targets):
    target = targets("Llama")

    def made():
        return QuantizedCache(backend="fp8", config=target.config)

    plain, assistant = chat(target, turns_of(6, 5), cache=made()), assistant_of()
    ours = chat(target, turns_of(6, 5), assistant, made())
    assert [turn.text.tolist() for turn in ours] == [turn.text.tolist() for turn in plain]
    assert [turn.fed for turn in ours] == [turn.fed for turn in plain]
    assert assistant.stats.total.plain_requests == 2


@pytest.mark.parametrize("name", ["Llama", "Qwen3_5ForCausalLM"])
def test_a_target_whose_inputs_another_prepares_goes_on_plainly(targets, caplog, name):
    target = copy.deepcopy(targets(name))
    plain = chat(target, turns_of(6, 5), cache=cache_of(target))
    assistant, cache = assistant_of(), cache_of(target)
    [first] = chat(target, turns_of(6, 5)[:1], assistant, cache)
    target.prepare_inputs_for_generation = target.prepare_inputs_for_generation
    text = torch.cat([first.text, turns_of(6, 5)[1]], -1)
    asked = {"max_new_tokens": N, "do_sample": False, "past_key_values": cache, "pad_token_id": 0}
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        text = target.generate(text, assistant_model=assistant, attention_mask=torch.ones_like(text), **asked)
    assert text.tolist() == plain[1].text.tolist()
    close(contents(cache), plain[1].tensors)
    assert "prepare_inputs_for_generation was replaced" in caplog.text


class Stops(BaseStreamer):
    """Ends a call by an error in one of its rounds, as a user's wish to stop may."""

    def __init__(self, after):
        self.after, self.said = after, []

    def put(self, value):
        self.said += value.flatten().tolist()
        self.after -= 1
        if self.after < 0:
            raise InterruptedError

    def end(self):
        pass


@pytest.mark.parametrize("after", [1, 2, 4])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3_5ForCausalLM"])
def test_a_chat_goes_on_from_a_call_that_an_error_ended(targets, name, after):
    """What rejected drafts put into the cache is gone."""
    target, cache, assistant, turns = targets(name), cache_of(targets(name)), assistant_of(), turns_of(6, 5, 9)
    [first] = chat(target, turns[:1], assistant, cache)
    text, asked = torch.cat([first.text, turns[1]], -1), {"max_new_tokens": N, "do_sample": False, "pad_token_id": 0}
    given = {"past_key_values": cache, "assistant_model": assistant, "streamer": (heard := Stops(after))}
    with pytest.raises(InterruptedError):
        target.generate(text, attention_mask=torch.ones_like(text), **given, **asked)
    text = torch.cat([torch.tensor([heard.said]), turns[2]], -1)
    assert cache.get_seq_length() < text.shape[1]
    assert (cache.get_seq_length() > 0) == (name != "Qwen3_5ForCausalLM")
    asked["attention_mask"] = torch.ones_like(text)
    alone, other = target.generate(text, **asked), copy.deepcopy(cache)
    for held, one in ((cache, assistant), (other, None)):
        output = target.generate(text, past_key_values=held, assistant_model=one, **asked)
        assert output.tolist() == alone.tolist()
    close(contents(cache), contents(other))


def test_no_process_waits_for_a_forward_that_completes_a_cache(targets):
    recurrent = "FalconH1ForCausalLM"
    for name, kept, plainly in ((recurrent, True, True), (recurrent, False, False), ("Llama", True, False)):
        call = RunningCall([], synced_gpus=True)
        why = _unsuited(targets(name), cache_of(targets(name)), call, {"use_cache": True}, kept)
        assert ("synced_gpus" in (why or "")) == plainly


# What is refused, before anything has run.


def filled(target, length):
    cache, [text] = cache_of(target), turns_of(length)
    with torch.no_grad():
        target(text, past_key_values=cache)
    return cache


LONGER = torch.ones(1, 9, dtype=torch.long)
REFUSED = {
    "as long as the prompt": (6, {}, r"already holds 6 tokens and the prompt has 6.*whole conversation.*crop\(-1\)"),
    "longer than the prompt": (9, {}, r"already holds 9 tokens and the prompt has 6.*crop\(-4\)"),
    "what is new alone": (3, {"attention_mask": LONGER}, r"is of 9 tokens and the prompt has 6.*whole conversation"),
    "and padding": (3, {"attention_mask": LONGER.tril().flip(-1)}, r"is of 9 tokens and the prompt has 6"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("name", ["Llama", "Qwen3_5ForCausalLM"])
def test_a_cache_that_the_prompt_does_not_go_beyond_is_refused(targets, name, case):
    target, (held, given, message) = targets(name), REFUSED[case]
    cache, assistant = filled(target, held), assistant_of()
    before = contents(cache)
    with pytest.raises(ValueError, match=message):
        target.generate(*turns_of(6), past_key_values=cache, assistant_model=assistant, max_new_tokens=4, **given)
    close(contents(cache), before)
    assert assistant.stats.total.requests == 0


def test_a_filled_cache_of_a_decoder_with_an_encoder_is_refused(tiny_model):
    target, [source, begun] = tiny_model("T5"), turns_of(6, 3)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        target(source, decoder_input_ids=begun, past_key_values=cache)
    asked = {"decoder_input_ids": begun, "past_key_values": cache, "max_new_tokens": 4}
    with pytest.raises(ValueError, match=r"already holds 3 tokens, and the target is an encoder-decoder.*Leave"):
        target.generate(source, assistant_model=assistant_of(), **asked)


def test_a_filled_cache_in_another_loop_than_generates_is_refused(targets):
    target, [text] = targets("Llama"), turns_of(6)
    asked = {"generation_config": target.generation_config, "inputs_tensor": text, "logits_processor": []}
    request = GenerateRequest(target, text, model_kwargs={"past_key_values": filled(target, 3)}, **asked)
    with pytest.raises(ValueError, match=r"already holds 3 tokens, and drafts are asked for by another loop"):
        assistant_of().open_call(request)
    assistant_of().open_call(replace(request, model_kwargs={"past_key_values": cache_of(target)}))
