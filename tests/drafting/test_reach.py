"""How far a draft reads, whatever its config calls that: beyond it, or where it fails, the target goes on alone, and nothing is learnt there."""

import copy
import logging

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LEDConfig,
    LEDForConditionalGeneration,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_osd import OnlineAssistant

from ..served import PROMPTS

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
BOTH = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 48))}
BOTH |= {"vocab_size": 64, "d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BOTH |= {"decoder_start_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": None}
LONG = {"max_new_tokens": 30, "do_sample": False}


def roberta(positions=26):
    """Two of its positions are padding's."""
    return RobertaForCausalLM(RobertaConfig(**SIZES, is_decoder=True, max_position_embeddings=positions)).eval()


def mpt(window=24):
    """It has distances, not positions, and no table of a row a token."""
    return MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_heads=4, n_layers=1, max_seq_len=window)).eval()


def whisper():
    return WhisperForConditionalGeneration(
        WhisperConfig(**BOTH, max_target_positions=20, max_source_positions=30, num_mel_bins=8)
    )


def bart(positions=32):
    return BartForConditionalGeneration(BartConfig(**BOTH, max_position_embeddings=positions)).eval()


def led():
    config = {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 64, "attention_window": 4}
    return LEDForConditionalGeneration(LEDConfig(**BOTH, **config)).eval()


def t5():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize(
    ("make", "window", "source"),
    [
        (roberta, 24, float("inf")),
        (whisper, 20, float("inf")),
        (bart, 32, 32),
        (led, 64, 128),
        (t5, float("inf"), float("inf")),
        (mpt, float("inf"), float("inf")),
    ],
)
def test_tables_of_positions_say_it(make, window, source):
    reach = OnlineAssistant(make(), learn=False).reach
    assert (reach.window, reach.source) == (window, source)


@pytest.mark.parametrize("make", [roberta, mpt])
def test_past_a_window_that_no_config_names_the_target_goes_on_alone(target, make, caplog):
    assistant = OnlineAssistant(make(), lookahead="constant", update_interval=1, suffix_cache=False)
    for prompt in PROMPTS[:4]:
        assert torch.equal(target.generate(prompt, **LONG), target.generate(prompt, assistant_model=assistant, **LONG))
    assert assistant.reach.window == 24
    assert assistant.stats.total.drafted > 0
    assert assistant.stats.buffer_requests == 0, "of 36 tokens"
    assert sum("failed in a call" in message for message in caplog.messages) == (make is mpt)
    target.generate(PROMPTS[4], assistant_model=assistant, max_new_tokens=12, do_sample=False)
    assert assistant.stats.buffer_requests == 1, "of 18"


def test_a_window_that_was_found_is_not_run_into_again(target, monkeypatch):
    assistant = OnlineAssistant(mpt(), lookahead="constant", learn=False, suffix_cache=False)
    target.generate(PROMPTS[0], assistant_model=assistant, **LONG)
    failures, forward = [], MptForCausalLM.forward

    def counted(self, *args, **kwargs):
        try:
            return forward(self, *args, **kwargs)
        except Exception as error:
            failures.append(error)
            raise

    monkeypatch.setattr(MptForCausalLM, "forward", counted)
    drafted = assistant.stats.total.drafted
    target.generate(PROMPTS[1], assistant_model=assistant, **LONG)
    assert assistant.stats.total.drafted > drafted
    assert not failures


@pytest.mark.parametrize("length", [20, 40])
def test_past_the_source_that_a_drafts_encoder_can_read_the_target_goes_on_alone(length):
    target, assistant = led(), OnlineAssistant(bart(), lookahead="constant", update_interval=10**6)
    source = torch.randint(3, 60, (1, length), generator=torch.Generator().manual_seed(0))
    plain = target.generate(source, **LONG)
    assert torch.equal(plain, target.generate(source, assistant_model=assistant, **LONG))
    assert (assistant.stats.total.drafted > 0) == (length == 20)
    assert assistant.stats.buffer_requests == (length == 20)


class FailsOn(LlamaForCausalLM):
    """Cannot read a certain token, as a model that sees cannot read an image's place without the image."""

    def forward(self, input_ids=None, **kwargs):
        if (input_ids == 9).any():
            raise RuntimeError("no image")
        return super().forward(input_ids=input_ids, **kwargs)


@pytest.mark.parametrize("sample", [False, True])
def test_a_draft_that_fails_on_a_texts_tokens_is_left_out_of_that_call_alone(target, draft, sample, caplog):
    assistant = OnlineAssistant(draft_of(FailsOn, draft), lookahead="constant", learn=False, suffix_cache=False)
    seen, plain = torch.tensor([[5, 6, 9, 7]]), torch.tensor([[5, 6, 8, 7]])
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            answer = target.generate(seen, assistant_model=assistant, **LONG | {"do_sample": sample})
        assert answer.shape[1] > 4
        if not sample:
            assert torch.equal(answer, target.generate(seen, **LONG))
    assert [("no image" in m, "goes on alone" in m) for m in caplog.messages] == [(True, True)], "said once"
    assert assistant.stats.total.drafted == 0
    assert assistant.reach.window == 512
    target.generate(plain, assistant_model=assistant, **LONG)
    assert assistant.stats.total.drafted > 0


def draft_of(kind, draft):
    other = kind(copy.deepcopy(draft.config))
    other.load_state_dict(draft.state_dict())
    return other.eval()


def test_running_out_of_memory_is_no_window(target, draft, monkeypatch):
    assistant = OnlineAssistant(draft, lookahead="constant", learn=False, suffix_cache=False)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("hf_osd.drafting.draft_model.DraftModelProposer.draft", full)
    assert torch.equal(
        target.generate(PROMPTS[0], **LONG), target.generate(PROMPTS[0], assistant_model=assistant, **LONG)
    )
    assert assistant.reach.window == 512
