"""The target's outputs on their way to a draft that reads its states: those of each round once, the last one's too, and of no other forward."""

import gc

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hf_osd import OnlineAssistant, grow_feature_draft
from hf_osd.generation.running import running_calls

PROMPT = torch.tensor([[5, 9, 17, 3]])
ASKED = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(PROMPT)}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def assistant_for(target, **config):
    settings = {"lookahead": "constant", "num_assistant_tokens": 3, "update_interval": 10**6, "suffix_cache": False}
    return OnlineAssistant(grow_feature_draft(target, seed=0), **settings | config)


def served(target, assistant, **kwargs):
    """The call's output, the target's states at it by a fresh forward, and those that were kept."""
    output = target.generate(PROMPT, assistant_model=assistant, **ASKED | kwargs)
    assistant.update()
    layers = assistant.serving.active.config.recorded_layers
    with torch.no_grad():
        hidden = target(output, output_hidden_states=True, use_cache=False).hidden_states
    return output, torch.cat([hidden[i] for i in layers], -1)[0], assistant.buffer.new()[-1].states.dense()


def check(fresh, kept):
    torch.testing.assert_close(kept, fresh[: len(kept)], atol=float(fresh.abs().max()) / 100, rtol=0)


@pytest.mark.parametrize("limit", [1, 2, 5, 9])
def test_those_of_a_calls_last_round_are_kept(target, limit):
    _, fresh, kept = served(target, assistant_for(target), max_new_tokens=limit)
    assert len(kept) == len(fresh) - 1
    check(fresh, kept)


class Generates(StoppingCriteria, BaseStreamer):
    """Calls generate within a call, where a user's code may: between rounds, and at their end."""

    def __init__(self, target, assistant=None):
        self.target, self.assistant = target, assistant

    def put(self, value):
        other = torch.tensor([[8, 2, 6]])
        asked = ASKED | {"attention_mask": None, "max_new_tokens": 3}
        self.target.generate(other, assistant_model=self.assistant, **asked)

    def end(self):
        pass

    def __call__(self, input_ids, scores, **kwargs):
        self.put(None)
        return torch.zeros(1, dtype=torch.bool)


@pytest.mark.parametrize("own", [False, True], ids=["plain", "assisted"])
@pytest.mark.parametrize("where", ["streamer", "stopping_criteria"])
def test_calls_within_a_call_are_not_taken_for_it(target, own, where):
    inner = Generates(target, assistant_for(target) if own else None)
    _, fresh, kept = served(target, assistant_for(target), **{where: inner if where == "streamer" else [inner]})
    assert len(kept) == len(fresh) - 1
    check(fresh, kept)


class Fails(BaseStreamer):
    """Raises after so many rounds."""

    def __init__(self, rounds):
        self.left = rounds + 1  # the prompt is put first

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise InterruptedError

    def end(self):
        pass


def test_a_call_that_breaks_off_leaves_nothing_behind(target):
    assistant = assistant_for(target)
    hooks = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in target.named_modules()}
    with pytest.raises(InterruptedError):
        target.generate(PROMPT, assistant_model=assistant, streamer=Fails(2), **ASKED)
    gc.collect()
    assistant.update()
    assert not running_calls()
    assert hooks == {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in target.named_modules()}
    assert assistant.stats.total.requests == 1
    _, fresh, kept = served(target, assistant)
    assert len(kept) == len(fresh) - 1
    check(fresh, kept)


class OfItsOwn(LlamaForCausalLM):
    """Keeps what the next forward needs without asking transformers to."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1):
        at = model_kwargs["position_ids"]
        later = at[:, -1:] + 1 + torch.arange(num_new_tokens)
        return model_kwargs | {"past_key_values": outputs.past_key_values, "position_ids": torch.cat([at, later], -1)}


class Silent(LlamaForCausalLM):
    """Gives no hidden states, whoever asks."""

    def forward(self, *args, output_hidden_states=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_target_that_passes_none_on_keeps_those_of_all_rounds_but_the_last(target):
    other = OfItsOwn(target.config).eval()
    other.load_state_dict(target.state_dict())
    _, fresh, kept = served(other, assistant_for(other))
    assert len(fresh) - 5 <= len(kept) < len(fresh) - 1
    check(fresh, kept)


def test_a_target_without_states_is_served_without_the_draft_and_a_warning_says_why(target, caplog):
    other = Silent(target.config).eval()
    other.load_state_dict(target.state_dict())
    assistant = assistant_for(other, verify_target=False)
    for _ in range(2):
        output = other.generate(PROMPT, assistant_model=assistant, **ASKED)
        assert torch.equal(output, other.generate(PROMPT, **ASKED))
    assistant.update()
    assert assistant.buffer.new()[-1].states is None
    [warning] = [r.message for r in caplog.records if "no hidden states" in r.message]
    assert "goes on alone" in warning
