"""What generate is told, and how it is called: whatever the options, the assisted call returns what the plain one does."""

import copy
import threading
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer

from hf_osd import OnlineAssistant, compare_outputs
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED

from .checks import SERVES_AT_ONCE

PROMPTS = torch.randint(2, 64, (6, 1, 6), generator=torch.Generator().manual_seed(0))
LENGTH = PROMPTS.shape[-1]
GREEDY = {"max_new_tokens": 14, "do_sample": False}
NO_EOS = {"eos_token_id": None, "pad_token_id": 1}
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=2)


@pytest.fixture(scope="module")
def draft(target, noised_copy):
    """Right about half of the time."""
    return noised_copy(target, 0.05)


def assist(draft, **config):
    return OnlineAssistant(
        draft,
        **{
            "lookahead": "constant",
            "update_interval": 10**6,
            "learning_rate": 1e-3,
            "seed": 0,
            **SERVES_AT_ONCE,
            **config,
        },
    )


def same(target, assistant, prompts=PROMPTS[:3], **kwargs):
    """Plain and assisted agree on every prompt, and the drafts were not all right or all wrong."""
    kwargs = {**GREEDY, **kwargs}
    for prompt in prompts:
        plain = target.generate(prompt, **kwargs)
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **kwargs))
    some_accepted_some_rejected(assistant)


def same_but_for_ties(target, assistant, prompts):
    for prompt in prompts:
        plain = target.generate(prompt, **GREEDY)
        output = target.generate(prompt, assistant_model=assistant, **GREEDY)
        assert compare_outputs(target, plain, output) != "mismatch"
    some_accepted_some_rejected(assistant)


def some_accepted_some_rejected(assistant):
    total = assistant.stats.total
    assert 0 < total.accepted < total.tested


class Hearing(BaseStreamer):
    def __init__(self):
        self.heard, self.ends = [], 0

    def put(self, value):
        assert not self.ends
        self.heard += value.flatten().tolist()

    def end(self):
        self.ends += 1


# How it is called.


def test_a_streamer_hears_every_token_once_and_in_order(target, draft):
    assistant = assist(draft)
    for prompt in PROMPTS[:3]:
        streamer = Hearing()
        output = target.generate(prompt, assistant_model=assistant, streamer=streamer, **GREEDY)
        assert torch.equal(output, target.generate(prompt, **GREEDY))
        assert (streamer.heard, streamer.ends) == (output[0].tolist(), 1)
    some_accepted_some_rejected(assistant)


def test_text_streams_out_of_another_thread(target, draft, tokenizer):
    assistant = assist(draft)
    for prompt in PROMPTS[:2]:
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
        kwargs = {"streamer": streamer, "assistant_model": assistant, **GREEDY}
        thread = threading.Thread(target=target.generate, args=(prompt,), kwargs=kwargs)
        thread.start()
        text = "".join(streamer)
        thread.join()
        assert text.split() == tokenizer.decode(target.generate(prompt, **GREEDY)[0, LENGTH:]).split()
    assert assistant.stats.total.requests >= 1


@pytest.mark.parametrize("grad_mode", [torch.inference_mode, torch.no_grad, torch.enable_grad, nullcontext])
def test_grad_modes_with_learning_in_between(target, draft, grad_mode):
    assistant = assist(draft, update_interval=2)
    with grad_mode():
        same(target, assistant, PROMPTS[:5])
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 0)


def test_under_the_users_autocast(target, draft):
    assistant = assist(draft, update_interval=2)
    with torch.autocast(**AUTOCAST):
        same_but_for_ties(target, assistant, PROMPTS[:5])
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 0)


@pytest.mark.parametrize("how", ["flush", "next call"])
def test_learning_does_not_run_under_the_users_autocast(target, draft, how):
    """The learner's float32 is float32: the same feedback teaches the same weights inside and outside."""

    def learnt(context):
        assistant = assist(draft, update_interval=2)
        for prompt in PROMPTS[:2]:
            target.generate(prompt, assistant_model=assistant, **GREEDY)
        with context:
            if how == "flush":
                assistant.flush()
            else:
                target.generate(PROMPTS[2], assistant_model=assistant, **GREEDY)
        assert assistant.stats.updates == 1
        return dict(assistant.serving.weights())

    outside, inside = learnt(nullcontext()), learnt(torch.autocast(**AUTOCAST))
    before = dict(draft.named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in outside.items())
    assert all(torch.equal(p, inside[name]) for name, p in outside.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_with_learning_in_between(target, draft, dtype):
    target, draft = copy.deepcopy(target).to(dtype), copy.deepcopy(draft).to(dtype)
    assistant = assist(draft, update_interval=3)
    same_but_for_ties(target, assistant, PROMPTS[:4])
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (1, 0)


def test_a_gradient_checkpointed_draft_in_train_mode(tiny_llama, noised_copy):
    """Such a model fills no cache, and its dropout would make drafts of noise: the copies that serve are neither."""
    target = tiny_llama(layers=2, attention_dropout=0.5)
    quiet, training = noised_copy(target, 0.05), noised_copy(target, 0.05).train()
    training.activation_checkpointing_enable()
    assistants = [assist(quiet), assist(training)]
    for assistant in assistants:
        same(target, assistant)
    assert assistants[0].stats.total.accepted == assistants[1].stats.total.accepted
    assert assistants[1].flush()
    same(target, assistants[1], PROMPTS[3:5])
    assert training.training


def test_in_a_pipeline(target, draft, tokenizer):
    from transformers import pipeline

    assistant, kwargs = assist(draft, update_interval=2), {"return_tensors": True, **GREEDY}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)
    assisted = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=assistant)
    for prompt in PROMPTS[:4]:
        text = tokenizer.decode(prompt[0])
        assert plain(text, **kwargs) == assisted(text, **kwargs)
    some_accepted_some_rejected(assistant)
    assert assistant.stats.updates == 1


# What it returns.


@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_scores_logits_hidden_states_and_attentions_are_plain_decodings(tiny_llama, noised_copy, scale):
    """One entry a token, of plain decoding's shapes and values; the first round's, which takes the prompt along, above all."""
    target = tiny_llama(layers=2, attn_implementation="eager")
    assistant = assist(noised_copy(target, scale))
    kwargs = {**GREEDY, "repetition_penalty": 1.2, "return_dict_in_generate": True}
    fields = ("scores", "logits", "hidden_states", "attentions")
    kwargs |= {f"output_{name}": True for name in fields}
    for prompt in PROMPTS[:3]:
        plain = target.generate(prompt, **kwargs)
        output = target.generate(prompt, assistant_model=assistant, **kwargs)
        assert type(output) is type(plain)
        assert torch.equal(output.sequences, plain.sequences)
        assert not torch.equal(plain.scores[0], plain.logits[0])
        for name in fields:
            ours, own = getattr(output, name), getattr(plain, name)
            assert len(ours) == len(own) == plain.sequences.shape[1] - LENGTH
            # Rows summed in another order: 1e-4 covers what tiny models show, about 1e-5.
            torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert assistant.stats.total.accepted > 0


@pytest.mark.parametrize("field", ["scores", "logits", "hidden_states", "attentions"])
def test_any_one_of_them_alone(tiny_llama, noised_copy, field):
    target = tiny_llama(layers=1, attn_implementation="eager")
    assistant = assist(noised_copy(target, 0.05))
    kwargs = {**GREEDY, "return_dict_in_generate": True, f"output_{field}": True}
    plain = target.generate(PROMPTS[0], **kwargs)
    output = target.generate(PROMPTS[0], assistant_model=assistant, **kwargs)
    assert set(output.keys()) == set(plain.keys())
    torch.testing.assert_close(output[field], plain[field], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", ["empty cache", "cache_implementation", "returned"])
def test_dynamic_caches_end_as_plain_decoding_leaves_them(target, draft, given):
    """A chat goes on from the cache: what rejected drafts put there must be gone."""
    assistant = assist(draft)
    for prompt in PROMPTS[:3]:
        caches = []
        for kwargs in ({}, {"assistant_model": assistant}):
            if given == "empty cache":
                kwargs["past_key_values"] = DynamicCache(config=target.config)
            elif given == "cache_implementation":
                kwargs["cache_implementation"] = "dynamic"
            output = target.generate(prompt, return_dict_in_generate=True, **GREEDY, **kwargs)
            caches.append(output.past_key_values)
            if given == "empty cache":
                assert output.past_key_values is kwargs["past_key_values"]
        own, ours = caches
        assert ours.get_seq_length() == own.get_seq_length() == output.sequences.shape[1] - 1
        for a, b in zip(own.layers, ours.layers, strict=True):
            torch.testing.assert_close((a.keys, a.values), (b.keys, b.values), atol=1e-4, rtol=1e-4)
    some_accepted_some_rejected(assistant)


# Where it ends.


@pytest.mark.parametrize("kind", [ACCEPTED, REJECTED, UNTESTED], ids=["drafted", "corrected", "bonus"])
def test_eos_wherever_in_a_block_it_falls(target, draft, kind):
    """Make an EOS of a token that, before it was one, was an accepted draft, a correction, or a bonus."""
    assistant, found = assist(draft), 0
    for prompt in PROMPTS:
        target.generate(prompt, assistant_model=assistant, **GREEDY, **NO_EOS)
        assistant.update()
        feedback = assistant.buffer.new()[-1]
        answer, outcome = feedback.answer.tolist(), feedback.outcome.tolist()
        places = [i for i in range(1, len(answer)) if outcome[i] == kind and answer[i] not in answer[:i]]
        for i in places[:2]:
            kwargs = {**GREEDY, "eos_token_id": answer[i], "pad_token_id": 0}
            plain = target.generate(prompt, **kwargs)
            assert plain.shape[1] == LENGTH + i + 1
            assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **kwargs))
            found += 1
    assert found >= 2


def test_several_eos_ids(target, draft):
    assistant = assist(draft)
    for prompt in PROMPTS[:3]:
        answer = target.generate(prompt, **GREEDY, **NO_EOS)[0, LENGTH:].tolist()
        same(target, assistant, [prompt], eos_token_id=[answer[9], answer[6], 1], pad_token_id=0)


def test_the_target_as_its_own_draft_drafts_its_eos(target):
    assistant = assist(target)
    for prompt in PROMPTS[:3]:
        answer = target.generate(prompt, **GREEDY, **NO_EOS)[0, LENGTH:].tolist()
        for eos in (answer[2], answer[5], answer[8]):
            kwargs = {**GREEDY, "eos_token_id": [eos, 1], "pad_token_id": 0}
            output = target.generate(prompt, assistant_model=assistant, **kwargs)
            assert torch.equal(target.generate(prompt, **kwargs), output)
    assert assistant.stats.total.accepted == assistant.stats.total.tested > 0


@pytest.mark.parametrize("of_itself", [True, False])
def test_every_length_limit(target, draft, of_itself):
    assistant = assist(target if of_itself else draft)
    longest = target.generate(PROMPTS[0], max_new_tokens=12, do_sample=False, **NO_EOS)
    for length in range(1, 13):
        limit = {"max_length": LENGTH + length} if length % 2 else {"max_new_tokens": length}
        output = target.generate(PROMPTS[0], assistant_model=assistant, do_sample=False, **NO_EOS, **limit)
        assert torch.equal(output, longest[:, : LENGTH + length])
    assert assistant.stats.total.accepted > 0


@pytest.mark.parametrize("least", [{"min_new_tokens": 7}, {"min_length": LENGTH + 7}])
def test_least_lengths(target, draft, least):
    assistant = assist(draft)
    for prompt in PROMPTS[:3]:
        eos = int(target.generate(prompt, **GREEDY, **NO_EOS)[0, LENGTH + 2])
        same(target, assistant, [prompt], eos_token_id=eos, pad_token_id=0, **least)
        output = target.generate(
            prompt, assistant_model=assistant, eos_token_id=eos, pad_token_id=0, **GREEDY, **least
        )
        assert output.shape[1] >= LENGTH + 7


# What it is given.


def test_left_padding(target, draft):
    mask = torch.tensor([[0] * 3 + [1] * LENGTH])
    for kwargs in ({}, {"repetition_penalty": 1.3}):
        padded = [torch.cat([torch.ones(1, 3, dtype=torch.long), prompt], dim=-1) for prompt in PROMPTS[:3]]
        same(target, assist(draft), padded, attention_mask=mask, **kwargs)


@pytest.mark.parametrize("positions", [[3, 4, 5, 6, 7, 8], [0, 0, 1, 1, 2, 5]])
def test_position_ids(target, draft, positions):
    same(target, assist(draft), position_ids=torch.tensor([positions]))


def test_inputs_embeds_beside_input_ids(target, draft):
    """They stand for the prompt in the first forward only, which so cannot take drafts along."""
    assistant, noise = assist(draft), torch.Generator().manual_seed(0)
    for prompt in PROMPTS[:3]:
        with torch.no_grad():
            embeds = target.get_input_embeddings()(prompt) + torch.randn(1, LENGTH, 32, generator=noise)
        plain = target.generate(prompt, inputs_embeds=embeds, **GREEDY)
        assert not torch.equal(plain, target.generate(prompt, **GREEDY))
        output = target.generate(prompt, inputs_embeds=embeds, assistant_model=assistant, **GREEDY)
        assert torch.equal(plain, output)


def test_beams_are_plain_beam_search(target, draft):
    assistant = assist(draft)
    for prompt in PROMPTS[:2]:
        plain = target.generate(prompt, num_beams=2, **GREEDY)
        assert torch.equal(plain, target.generate(prompt, num_beams=2, assistant_model=assistant, **GREEDY))
    assert assistant.stats.total.requests == 0


def test_no_guidance_and_no_ensemble_are_served(target, draft):
    same(target, assist(draft), guidance_scale=1.0, assistant_ensemble_weight=None)


# What is refused.


def prefilled(target):
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(PROMPTS[0], past_key_values=cache)
    return cache


REFUSED = {
    "num_return_sequences": (r"num_return_sequences", lambda t: {"num_return_sequences": 2, "do_sample": True}),
    "batch": (r"batch", lambda t: {"inputs": PROMPTS[:2, 0]}),
    "use_cache": (r"use_cache", lambda t: {"use_cache": False}),
    "static cache": (r"[Ss]tatic", lambda t: {"cache_implementation": "static"}),
    "full cache": (r"past_key_values", lambda t: {"past_key_values": prefilled(t)}),
    "embeds alone": (r"input_ids", lambda t: {"inputs": None, "inputs_embeds": torch.zeros(1, LENGTH, 32)}),
    "ensemble": (r"assistant_ensemble_weight", lambda t: {"assistant_ensemble_weight": 0.5}),
    "guidance": (r"guidance_scale", lambda t: {"guidance_scale": 1.5}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_before_anything_is_learnt(target, draft, case):
    message, make = REFUSED[case]
    assistant = assist(draft, update_interval=2)
    for prompt in PROMPTS[:2]:
        target.generate(prompt, assistant_model=assistant, **GREEDY)
    with pytest.raises(ValueError, match=message):
        target.generate(assistant_model=assistant, **{"inputs": PROMPTS[2], **GREEDY, **make(target)})
    assert assistant.stats.updates == 0  # though one is due
    assert assistant.stats.total.requests <= 2
    same(target, assistant, PROMPTS[2:5])
    assert (assistant.stats.total.requests, assistant.stats.updates) == (5, 2)
    assert not assistant.serving._leases


def test_a_target_that_keeps_its_state_outside_of_any_cache_decodes_plainly(draft, caplog):
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "vocab_size": 64}
    mamba = MambaForCausalLM(MambaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1)).eval()
    assistant = assist(draft)
    with caplog.at_level("WARNING", logger="hf_osd"):
        output = mamba.generate(PROMPTS[0], assistant_model=assistant, **GREEDY)
    assert torch.equal(output, mamba.generate(PROMPTS[0], **GREEDY))
    assert "MambaForCausalLM decodes plainly" in caplog.text
    assert not assistant.serving._leases
