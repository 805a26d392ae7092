"""Drafts that read the target's states: the output is the target's, the drafts are those that these states give, and there is no forward more."""

import pytest
import torch

from hf_osd import OnlineAssistant, grow_feature_draft
from hf_osd.drafting.feature_context import FeatureContext

from .checks import assistant_of, check_sampling, forwards_of, unpadded
from .feature_drafts import check_drafted, fitted, states_of

DECODERS = ["Llama", "Qwen2", "Qwen3", "Gemma3", "Mistral", "GPT2", "Phi", "Mixtral", "Qwen2Moe"]
PROMPTS = torch.randint(3, 60, (3, 1, 6), generator=torch.Generator().manual_seed(0))
GAMMA = {"num_assistant_tokens": 3}


@pytest.mark.parametrize("name", DECODERS)
def test_every_architecture_is_drafted_for_from_its_own_states(tiny_model, serve_as_plain, name):
    target = tiny_model(name, layers=4)
    draft = fitted(target, PROMPTS[:2])
    served = serve_as_plain(target, draft, PROMPTS, {"suffix_cache": False, **GAMMA})
    total = served.stats.total
    assert 0 < total.accepted < total.tested
    assert len(served.feedback) == 3
    for feedback in served.feedback:
        check_drafted(target, draft, feedback, 3)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT2"])
def test_what_is_kept_are_the_states_of_a_fresh_forward(tiny_model, serve_as_plain, name):
    target = tiny_model(name, layers=4)
    served = serve_as_plain(target, fitted(target, PROMPTS[:1]), PROMPTS, {"suffix_cache": False, **GAMMA})
    for feedback in served.feedback:
        layers = served.assistant.serving.active.config.recorded_layers
        fresh = states_of(target, feedback.tokens[None].long(), layers)[0]
        kept = feedback.states.dense()
        assert feedback.states.start == 0
        # The last token has not been read by the target yet.
        assert len(kept) == len(fresh) - 1
        assert feedback.num_teaching("all", states=True) == len(feedback) + len(feedback.prompt_rows) - 1
        torch.testing.assert_close(kept, fresh[:-1], atol=float(fresh.abs().amax()) / 100, rtol=0)


def test_a_long_prompt_keeps_the_states_of_its_last_tokens(tiny_model, serve_as_plain):
    target = tiny_model("Llama", layers=4)
    prompt = torch.randint(3, 60, (1, 40), generator=torch.Generator().manual_seed(1))
    served = serve_as_plain(
        target, fitted(target, PROMPTS[:1]), [prompt], {"suffix_cache": False, "prompt_positions": 8}
    )
    [feedback] = served.feedback
    assert feedback.states.start == 40 - 8 - 2
    layers = served.assistant.serving.active.config.recorded_layers
    fresh = states_of(target, feedback.tokens[None].long(), layers)[0]
    torch.testing.assert_close(feedback.states.dense(), fresh[30:-1], atol=float(fresh.abs().amax()) / 100, rtol=0)


def test_there_is_no_forward_of_the_target_more(tiny_model):
    target = tiny_model("Llama", layers=4)
    assistant = assistant_of(fitted(target, PROMPTS[:1]), verify_target=False, **GAMMA)
    with forwards_of(target) as seen:
        target.generate(
            PROMPTS[0],
            assistant_model=assistant,
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            **unpadded(PROMPTS[0]),
        )
    total = assistant.stats.total
    assert total.accepted > 0
    assert len(seen) == total.rounds


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 10, "eos_token_id": list(range(3, 40))},
        {"eos_token_id": [7, 11, 20]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"suppress_tokens": [5, 9]},
    ],
    ids=str,
)
def test_with_processors_and_ends(tiny_model, serve_as_plain, kwargs):
    target = tiny_model("Llama", layers=4)
    serve_as_plain(target, fitted(target, PROMPTS[:2]), PROMPTS, {"suffix_cache": True, **GAMMA}, **kwargs)


def test_padding_before_a_prompt_is_nothing_to_the_draft(tiny_model, serve_as_plain):
    target = tiny_model("Llama", layers=4)
    draft = fitted(target, PROMPTS[:2])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), PROMPTS[0]], dim=-1)
    plain = serve_as_plain(target, draft, [PROMPTS[0]], {"suffix_cache": False, **GAMMA})
    served = serve_as_plain(
        target, draft, [padded], {"suffix_cache": False, **GAMMA}, attention_mask=(padded != 0).long()
    )
    assert served.feedback[0].drafted.tolist() == plain.feedback[0].drafted.tolist()
    torch.testing.assert_close(served.feedback[0].states.dense(), plain.feedback[0].states.dense(), atol=2e-2, rtol=0)


def test_states_that_the_user_asks_for_are_those_of_plain_decoding(tiny_model):
    target = tiny_model("Llama", layers=4)
    asked = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "output_hidden_states": True}
    asked |= {"return_dict_in_generate": True, **unpadded(PROMPTS[0])}
    plain = target.generate(PROMPTS[0], **asked)
    assistant = assistant_of(fitted(target, PROMPTS[:1]), **GAMMA)
    ours = target.generate(PROMPTS[0], assistant_model=assistant, **asked)
    assert torch.equal(ours.sequences, plain.sequences)
    assert assistant.stats.total.accepted > 0
    assert len(ours.hidden_states) == len(plain.hidden_states)
    for one, other in zip(ours.hidden_states, plain.hidden_states, strict=True):
        assert len(one) == len(other) == 5
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampling_is_exact(temperature, tiny_llama):
    target = tiny_llama(layers=3, vocab=5, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    draft = fitted(target, [torch.tensor([[1, 2, 3]])], n=8, steps=20)
    check_sampling(target, draft, 3, 320, 2, temperature=temperature)


def test_blocks_that_the_cache_ends(tiny_model, serve_as_plain):
    target = tiny_model("Llama", layers=4)
    prompts = [*PROMPTS, *PROMPTS]
    config = {"suffix_cache": True, "lookahead": "cost", "draft_cost": 0.05, "verify_cost": 0.01}
    served = serve_as_plain(target, fitted(target, PROMPTS[:2]), prompts, config)
    assert served.stats.total.accepted > 0


def test_one_token_prompts(tiny_model, serve_as_plain):
    target = tiny_model("Llama", layers=4)
    prompts = [torch.tensor([[t]]) for t in (3, 9, 12)]
    served = serve_as_plain(target, fitted(target, PROMPTS[:2]), prompts, {"suffix_cache": False, **GAMMA})
    for feedback in served.feedback:
        check_drafted(target, served.assistant.serving.active, feedback, 3)


# What cannot be drafted for.


def asked_of(target, draft, **kwargs):
    return target.generate(
        PROMPTS[0], assistant_model=OnlineAssistant(draft), max_new_tokens=4, do_sample=False, pad_token_id=0, **kwargs
    )


def test_another_target_is_refused(tiny_model):
    draft = grow_feature_draft(tiny_model("Llama", layers=4))
    with pytest.raises(ValueError, match=r"width 32 and those of the target .* have 48"):
        asked_of(tiny_model("Llama", layers=4, hidden_size=48), draft)
    for layers in (1, 6):
        with pytest.raises(ValueError, match=rf"layers \[1, 2, 3\] of 4 and the target .* has {layers} layers"):
            asked_of(tiny_model("Llama", layers=layers), draft)
    with pytest.raises(ValueError, match=r"64 tokens and the target .* 80.*no tokenizers help"):
        asked_of(tiny_model("Llama", layers=4, vocab_size=80), draft)
    with pytest.raises(ValueError, match="encoder-decoder"):
        asked_of(tiny_model("T5"), draft)


# Planted bugs, each of which the checks above must catch.


def states_off_by_one(monkeypatch):
    original = FeatureContext.add_states

    def add_states(self, hidden_states, count, mask=None):
        rolled = [None if h is None else h.roll(1, dims=1) for h in hidden_states]
        return original(self, rolled, count, mask)

    monkeypatch.setattr(FeatureContext, "add_states", add_states)


def a_drafted_state_is_taken_for_a_true_one(monkeypatch):
    """Columns of accepted drafts stay in the cache as the draft's own states made them."""

    def crop(self, accepted):
        kept = self._true_columns + accepted
        self._cache.crop(-max(self._cache.get_seq_length() - kept, 0))
        self._true_columns = min(kept, self._cache.get_seq_length())

    monkeypatch.setattr(FeatureContext, "crop", crop)


def another_layer(monkeypatch):
    original = FeatureContext.add_states

    def add_states(self, hidden_states, count, mask=None):
        known = [i for i, h in enumerate(hidden_states) if h is not None]
        swapped = list(hidden_states)
        swapped[known[0]], swapped[known[1]] = hidden_states[known[1]], hidden_states[known[0]]
        return original(self, swapped, count, mask)

    monkeypatch.setattr(FeatureContext, "add_states", add_states)


def the_second_step_stands_where_the_first_did(monkeypatch):
    original = FeatureContext.step

    def step(self, token):
        forward, at = type(self.model).forward, self._cache.get_seq_length() - 1
        self.model.forward = lambda **kwargs: forward(self.model, position_ids=torch.tensor([[at]]), **kwargs)
        try:
            return original(self, token)
        finally:
            del self.model.forward

    monkeypatch.setattr(FeatureContext, "step", step)


def the_prompts_last_state_is_left_out(monkeypatch):
    original = FeatureContext.add_states

    def add_states(self, hidden_states, count, mask=None):
        if mask is not None:
            lost = len(mask) - 1
            hidden_states = [
                None if h is None else h.clone().index_fill_(1, torch.tensor([lost]), 0.0) for h in hidden_states
            ]
        return original(self, hidden_states, count, mask)

    monkeypatch.setattr(FeatureContext, "add_states", add_states)


def rejected_states_are_kept(monkeypatch):
    original = FeatureContext.add_states

    def add_states(self, hidden_states, count, mask=None):
        if mask is None:  # the last ones of the forward in place of the first
            hidden_states = [None if h is None else h[:, -count:] for h in hidden_states]
        return original(self, hidden_states, count, mask)

    monkeypatch.setattr(FeatureContext, "add_states", add_states)


@pytest.mark.parametrize(
    "plant",
    [
        None,
        states_off_by_one,
        a_drafted_state_is_taken_for_a_true_one,
        another_layer,
        the_second_step_stands_where_the_first_did,
        the_prompts_last_state_is_left_out,
        rejected_states_are_kept,
    ],
    ids=lambda plant: plant.__name__ if plant else "none",
)
def test_planted_bugs_are_caught_by_what_is_drafted(tiny_model, serve, plant, monkeypatch):
    target = tiny_model("Llama", layers=4)
    draft = fitted(target, PROMPTS[:2])
    draft.midlayer.self_attn.q_proj.weight.data.mul_(8)  # so that it matters where a token stands
    if plant is not None:
        plant(monkeypatch)
    served = serve(target, draft, PROMPTS, {"suffix_cache": False, **GAMMA})
    try:
        for feedback in served.feedback:
            check_drafted(target, draft, feedback, 3)
    except AssertionError:
        assert plant is not None
    else:
        assert plant is None, "it was not caught"
