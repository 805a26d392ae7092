"""What is refused: each error names the thing, its value and the mend, and nothing has run by then."""

import pytest
import torch

from hf_osd import OnlineAssistant, grow_draft

PROMPTS = torch.randint(2, 64, (2, 1, 6), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=3)


@pytest.fixture(scope="module")
def draft(target):
    return grow_draft(target, (0, -1))


def test_bad_calls_are_refused_before_anything_runs(target, draft, tiny_llama):
    from transformers import DynamicCache

    assistant = OnlineAssistant(draft)
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(PROMPTS[0][:, :3], past_key_values=cache)
    cases = {
        r"batch has 2 prompts.*each prompt": {"inputs": torch.cat([PROMPTS[0], PROMPTS[1]])},
        r"`past_key_values` already holds 3 tokens.*[Ll]eave": {"inputs": PROMPTS[0], "past_key_values": cache},
        r"`inputs_embeds`.*input_ids": {"inputs_embeds": torch.zeros(1, 3, 32)},
        r"[Ss]tatic": {"inputs": PROMPTS[0], "cache_implementation": "static"},
    }
    for message, kwargs in cases.items():
        with pytest.raises(ValueError, match=message):
            target.generate(assistant_model=assistant, **GREEDY, **kwargs)
    with pytest.raises(ValueError, match="tokenizer"):  # transformers' own check comes first
        target.generate(PROMPTS[0], assistant_model=OnlineAssistant(tiny_llama(vocab=80)), **GREEDY)
    assert assistant.stats.total.requests == 0
    assert not assistant.serving._leases


def test_other_vocabularies_are_refused_with_both_sizes(target, tiny_llama):
    class Tokenizer:
        pass

    with pytest.raises(ValueError, match=r"64 tokens and the draft 80.*grow_draft"):
        target.generate(
            PROMPTS[0],
            assistant_model=OnlineAssistant(tiny_llama(vocab=80)),
            tokenizer=Tokenizer(),
            assistant_tokenizer=Tokenizer(),
            **GREEDY,
        )


def test_a_draft_that_is_no_decoder_is_refused():
    from transformers import LlamaConfig, LlamaModel, T5Config, T5ForConditionalGeneration

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4))
    for bad in (LlamaModel(LlamaConfig(**sizes)), t5, "a name"):
        with pytest.raises(ValueError, match=r"`draft` is a .*AutoModelForCausalLM"):
            OnlineAssistant(bad)
