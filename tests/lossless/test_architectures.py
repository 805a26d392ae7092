"""Every architecture as target: greedy output is its own while drafts are accepted in part and learn, and what is recorded is what it said."""

import copy

import pytest
import torch
from transformers import BartForCausalLM, LlamaForCausalLM

from hf_osd import grow_draft

DECODERS = ["Llama", "Qwen2", "Qwen3", "Gemma3", "Mistral", "GPT2", "GPTNeoX", "Phi", "OPT", "Mixtral", "Qwen2Moe"]
SEQ2SEQ = ["T5", "Bart"]
PROMPTS = torch.randint(3, 60, (6, 1, 6), generator=torch.Generator().manual_seed(0))
LEARNS = {"update_interval": 2, "learning_rate": 5e-3}
# Sums in another order (cached and uncached attention): tiny models show about 1e-5.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def answers_at(target, output, prompt) -> tuple[slice, dict]:
    """Which rows of a full forward predict the answer in `output`, and that forward's inputs."""
    if target.config.is_encoder_decoder:
        return slice(0, -1), {"input_ids": prompt, "decoder_input_ids": output}
    return slice(prompt.shape[1] - 1, -1), {"input_ids": output}


@torch.no_grad()
def logits_of(target, output, prompt, **extra):
    """What the target says at each token of the answer, by one forward without a cache: `(N, V)`."""
    rows, inputs = answers_at(target, output, prompt)
    return target(**inputs, use_cache=False, **extra).logits[0, rows]


def check_feedback(target, output, feedback, prompt, **extra):
    assert feedback.tokens.tolist() == output[0].tolist()
    if target.config.is_encoder_decoder:
        assert feedback.prompt_length == 1  # the token that the decoder starts with
    log_p = logits_of(target, output, prompt, **extra).log_softmax(-1)
    dense = torch.full_like(log_p, torch.nan).scatter(-1, feedback.top_ids.long(), feedback.top_logps)  # k = V
    torch.testing.assert_close(dense, log_p, **CLOSE)


def check_partly_accepted(*calls):
    """Else equal outputs would say nothing: of drafts that are all right, or all wrong, the tokens are easily the target's."""
    totals = [served.stats.total for served in calls]
    assert 0 < sum(total.accepted for total in totals) < sum(total.tested for total in totals)


def check_learnt(served, updates):
    assert (served.stats.updates, served.stats.failed_updates, served.stats.draft_version) == (updates, 0, updates)


def decoder_of(bart):
    """The decoder of a BART alone, which attends to whatever encoder it is given."""
    decoder = BartForCausalLM(copy.deepcopy(bart.config)).eval()
    decoder.model.decoder.load_state_dict(bart.model.decoder.state_dict())
    decoder.lm_head.load_state_dict(bart.lm_head.state_dict())
    return decoder


def language_model_of(llava):
    """A plain Llama of the weights with which a LLaVA writes."""
    llama = LlamaForCausalLM(copy.deepcopy(llava.config.text_config)).eval()
    llama.model.load_state_dict(llava.model.language_model.state_dict())
    llama.lm_head.load_state_dict(llava.lm_head.state_dict())
    return llama


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ, "Llava"])
def test_tiny_models_have_something_to_say(tiny_model, name):
    """Of the fixture: a model that repeats one token would hide most of what can go wrong."""
    target = tiny_model(name)
    for prompt in PROMPTS[:3]:
        output = target.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert len(output[0, -24:].unique()) >= 6


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_noised_copies(tiny_model, noised_copy, serve_as_plain, name):
    target, calls = tiny_model(name), []
    for scale in (0.02, 0.1):
        served = serve_as_plain(target, noised_copy(target, scale), PROMPTS[:2])
        for prompt, output, feedback in zip(PROMPTS, served.outputs, served.feedback, strict=False):
            check_feedback(target, output, feedback, prompt)
        assert len(served.feedback) == 2
        calls.append(served)
    check_partly_accepted(*calls)


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_the_target_as_its_own_draft(tiny_model, serve_as_plain, name):
    """A cache of the draft's that is off by a token, or a position, shows as a rejection, and nowhere else."""
    target = tiny_model(name)
    assert serve_as_plain(target, target, PROMPTS[:2]).stats.total.alpha_live == 1.0


@pytest.mark.parametrize("name", DECODERS)
def test_grown_drafts_learn_while_they_serve(tiny_model, serve_as_plain, name):
    target = tiny_model(name)
    served = serve_as_plain(target, grow_draft(target, (0, -1)), PROMPTS, LEARNS)
    check_learnt(served, updates=3)
    assert served.stats.total.tested > 0


@pytest.mark.parametrize("name", [*DECODERS, *SEQ2SEQ])
def test_sampled_logits_are_a_fresh_forwards(tiny_model, noised_copy, serve, name):
    target = tiny_model(name)
    torch.manual_seed(0)
    asked = {
        "do_sample": True,
        "top_k": 20,
        "temperature": 0.9,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    served = serve(target, noised_copy(target, 0.1), PROMPTS[:2], **asked)
    for prompt, output, feedback in zip(PROMPTS, served.outputs, served.feedback, strict=False):
        fresh = logits_of(target, output.sequences, prompt)
        assert len(output.logits) == 24
        torch.testing.assert_close(torch.cat(output.logits), fresh, **CLOSE)
        check_feedback(target, output.sequences, feedback, prompt)
    check_partly_accepted(served)


# Encoder-decoders.


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_draft_with_an_encoder_of_its_own_learns(tiny_model, noised_copy, serve_as_plain, name):
    target = tiny_model(name)
    draft = noised_copy(target, 0.1)
    served = serve_as_plain(target, draft, PROMPTS, LEARNS)
    check_learnt(served, updates=3)
    check_partly_accepted(served)
    weights = dict(served.assistant.serving.active.named_parameters())
    moved = {
        key.split(".")[0 if name == "T5" else 1]
        for key, p in draft.named_parameters()
        if not torch.equal(p, weights[key])
    }
    assert {"encoder", "decoder"} <= moved


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_feedback_keeps_what_the_encoder_read(tiny_model, noised_copy, serve_as_plain, name):
    """And no padding: the learner's encoder would read it."""
    target = tiny_model(name)
    padded = torch.cat([PROMPTS[0], torch.zeros(1, 3, dtype=torch.long)], dim=-1)
    mask = (padded != 0).long()
    served = serve_as_plain(target, noised_copy(target, 0.1), [padded], attention_mask=mask)
    [feedback] = served.feedback
    assert feedback.source.tolist() == PROMPTS[0][0].tolist()
    check_feedback(target, served.outputs[0], feedback, padded, attention_mask=mask)
    own = serve_as_plain(target, target, [padded], attention_mask=mask)
    assert own.stats.last.alpha_live == 1.0


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_draft_encodes_anew_what_came_encoded(tiny_model, noised_copy, serve_as_plain, name):
    target = tiny_model(name)
    other = noised_copy(target, 0.1)
    for draft in (target, other):
        for prompt in PROMPTS[:2]:
            encoded = target.get_encoder()(prompt)
            served = serve_as_plain(target, draft, [prompt], encoder_outputs=encoded)
            check_feedback(target, served.outputs[0], served.feedback[0], prompt)
            if draft is target:
                assert served.stats.last.alpha_live == 1.0


@pytest.mark.parametrize("given", ["tokens", "encoded", "both"])
def test_a_decoder_shares_the_targets_encoder(tiny_model, noised_copy, serve_as_plain, given):
    """The target's own decoder is right everywhere if, and only if, it attends to what the target's encoder made."""
    target = tiny_model("Bart")
    own, noised = decoder_of(target), noised_copy(decoder_of(target), 0.1)
    right, partly = [], []
    for prompt in PROMPTS[:3]:
        encoded = {} if given == "tokens" else {"encoder_outputs": target.get_encoder()(prompt)}
        prompts = [None if given == "encoded" else prompt]
        right.append(serve_as_plain(target, own, prompts, {"learn": False}, **encoded))
        partly.append(serve_as_plain(target, noised, prompts, {"learn": False}, **encoded))
    assert all(served.stats.last.alpha_live == 1.0 for served in right)
    check_partly_accepted(*partly)


def test_a_decoder_that_shares_an_encoder_is_served_whether_it_may_learn_or_not(tiny_model, serve_as_plain):
    target = tiny_model("Bart")
    served = serve_as_plain(target, decoder_of(target), PROMPTS, LEARNS)
    assert served.stats.total.alpha_live == 1.0
    assert served.stats.failed_updates == 0


# Targets that see.

UNSEEN = {"suppress_tokens": [63]}  # no image token in the answer: a fresh forward would look for its image


@pytest.fixture(scope="module")
def image():
    """Four patches: a prompt with four image tokens, and the pixels."""
    llava_image = 63
    prompt = torch.cat([PROMPTS[0][:, :2], torch.full((1, 4), llava_image), PROMPTS[0][:, 2:]], dim=-1)
    return prompt, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_image_matters(tiny_model, image):
    """Of the tests below: a target that looks away would prove nothing."""
    target, (prompt, pixels) = tiny_model("Llava"), image
    asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    seeing = target.generate(prompt, pixel_values=pixels, **asked)
    assert not torch.equal(seeing, target.generate(prompt, pixel_values=-pixels, **asked))


@pytest.mark.parametrize("kind", [language_model_of, copy.deepcopy])
def test_drafts_of_a_target_that_sees_read_tokens_alone(tiny_model, noised_copy, serve_as_plain, image, kind):
    target, (prompt, pixels) = tiny_model("Llava"), image
    draft = kind(target)
    text = serve_as_plain(target, draft, PROMPTS[:2])
    assert text.stats.total.alpha_live == 1.0
    seen = serve_as_plain(target, draft, [prompt], pixel_values=pixels, **UNSEEN)
    check_feedback(target, seen.outputs[0], seen.feedback[0], prompt, pixel_values=pixels)
    assert seen.stats.last.tested > 0
    noised = serve_as_plain(target, noised_copy(draft, 0.05), PROMPTS[:2])
    check_partly_accepted(noised)


def test_a_text_draft_learns_from_a_target_that_sees(tiny_model, noised_copy, serve_as_plain, image):
    target, (prompt, pixels) = tiny_model("Llava"), image
    served = serve_as_plain(
        target, noised_copy(language_model_of(target), 0.1), [prompt] * 4, LEARNS, pixel_values=pixels, **UNSEEN
    )
    check_learnt(served, updates=2)
    served = serve_as_plain(target, served.assistant, PROMPTS)  # and from text, with the same assistant
    check_learnt(served, updates=5)
    check_partly_accepted(served)


def test_sampled_logits_of_a_target_that_sees(tiny_model, serve, image):
    target, (prompt, pixels) = tiny_model("Llava"), image
    torch.manual_seed(0)
    asked = {"do_sample": True, "top_k": 0, "return_dict_in_generate": True, "output_logits": True, **UNSEEN}
    served = serve(target, language_model_of(target), [prompt], pixel_values=pixels, **asked)
    [output] = served.outputs
    fresh = logits_of(target, output.sequences, prompt, pixel_values=pixels)
    torch.testing.assert_close(torch.cat(output.logits), fresh, **CLOSE)
