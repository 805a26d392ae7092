"""Heads of some rows: views of models that have one, and which one an assistant's draft gets."""

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    ChameleonConfig,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_osd import OnlineConfig
from hf_osd.drafting.context import DraftLogits
from hf_osd.models import draft_head
from hf_osd.models.draft_head import DraftHead, can_select_rows, with_head
from hf_osd.models.draft_vocab import DraftVocab, LowRank, LowRankHead, RowsHead

# Views of models

_IDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
_SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
_GEMMA = {
    "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 2.0,
}  # fmt: skip
_GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.3}
_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_MAMBA = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
DECODERS = {
    "Qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "Qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "Gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, _GEMMA),  # caps its logits
    "Mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 4}),
    "GPTNeoX": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
    "Phi": (PhiForCausalLM, PhiConfig, {}),  # a head with bias
    "OPT": (OPTForCausalLM, OPTConfig, {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "Mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.5}),
    "Cohere2": (Cohere2ForCausalLM, Cohere2Config, {"logit_scale": 0.5}),
    "Granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 2.0}),
}


def decoder(name: str):
    kind, config, values = DECODERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config(**{**_IDS, **_SIZES, **values})).eval().requires_grad_(False)


def a_head(model):
    vocabulary = DraftVocab(64, 12)
    vocabulary.observe([50, 60])
    return vocabulary.head(model.get_output_embeddings(), torch.tensor([40, 3]))


def assert_view_works(model):
    """With a cache, two forwards: the logits of the view are columns of the model's."""
    head = a_head(model)
    parameters, old = [*model.parameters()], model.get_output_embeddings()
    view = with_head(model, head)
    assert view.get_output_embeddings() is head
    assert model.get_output_embeddings() is old
    assert {id(p) for p in view.parameters()} <= {id(p) for p in parameters}
    config = model.config.get_text_config(decoder=True)
    caches = [DynamicCache(config=config) for _ in range(2)]
    ids = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for part, keep in ((ids[:, :6], 2), (ids[:, 6:], 1)):
            ours, theirs = (
                m(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
                for m, cache in zip((view, model), caches, strict=True)
            )
            assert ours.shape == (1, keep, 13)
            torch.testing.assert_close(ours, theirs[..., head.ids], rtol=1e-4, atol=1e-4)
    assert head.hidden.shape == (1, 1, 32)


@pytest.mark.parametrize("name", DECODERS)
def test_a_view_gives_columns_of_the_models_logits(name):
    model = decoder(name)
    assert can_select_rows(model)
    assert_view_works(model)


def test_a_view_of_a_llama_and_of_a_gpt2(tiny_llama):
    for model in (tiny_llama(), tiny_llama(tie_word_embeddings=True), GPT2LMHeadModel(GPT2Config(**_GPT2)).eval()):
        assert can_select_rows(model)
        assert_view_works(model)


def test_a_view_of_a_model_whose_forward_asks_the_heads_dtype():
    model = MambaForCausalLM(MambaConfig(**_MAMBA)).eval()
    assert can_select_rows(model)
    head, ids = a_head(model), torch.randint(64, (1, 6))
    with torch.no_grad():
        torch.testing.assert_close(with_head(model, head)(ids).logits, model(ids).logits[..., head.ids])


def test_a_view_of_an_encoder_decoder():
    model = T5ForConditionalGeneration(T5Config(**_T5, decoder_start_token_id=0)).eval()
    assert can_select_rows(model)
    head = a_head(model)
    inputs, ids = torch.randint(2, 64, (1, 5)), torch.randint(2, 64, (1, 4))
    with torch.no_grad():
        encoded = model.get_encoder()(inputs)
        logits = [
            m(
                encoder_outputs=encoded,
                decoder_input_ids=ids,
                past_key_values=EncoderDecoderCache(
                    DynamicCache(config=model.config), DynamicCache(config=model.config)
                ),
            ).logits
            for m in (with_head(model, head), model)
        ]
    torch.testing.assert_close(logits[0], logits[1][..., head.ids], rtol=1e-4, atol=1e-4)


def test_a_view_of_a_peft_model(tiny_llama):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    assert can_select_rows(model)
    assert_view_works(model)
    assert type(model.base_model.model.lm_head) is nn.Linear
    trained = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert not can_select_rows(trained)


def test_a_view_shares_modules_and_leaves_the_model_alone(tiny_llama):
    model = tiny_llama()
    modules = dict(model.named_modules())
    view = with_head(model, LowRankHead(model.lm_head, LowRank(model.lm_head, 8), 12))
    assert view is not model
    assert view.model is model.model
    assert dict(model.named_modules()) == modules
    with torch.no_grad():
        assert view(torch.tensor([[3, 4]])).logits.shape == (1, 2, 12)
        assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, 64)


def test_models_whose_rows_cannot_be_chosen(tiny_llama):
    assert not can_select_rows(BartForConditionalGeneration(BartConfig(**_BART)))
    hooked, patched, quantised, meta = (tiny_llama() for _ in range(4))
    hooked.lm_head.register_forward_hook(lambda *_: None)
    patched.forward = patched.forward
    quantised.lm_head = type("Linear4bit", (nn.Linear,), {})(32, 64)
    meta.lm_head.to("meta")
    for model in (hooked, patched, quantised, meta, tiny_llama().model):
        assert not can_select_rows(model)
    reads_ids = tiny_llama()
    reads_ids.config = ChameleonConfig()
    assert not can_select_rows(reads_ids)
    with pytest.raises(ValueError, match="LlamaModel has no LM head among its modules; choose"):
        with_head(tiny_llama().model, nn.Identity())


# Which head a draft gets


def head_of(model, **config):
    return DraftHead.from_config(model, OnlineConfig(**config))


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({"draft_head": "full", "draft_vocab_size": 8}, False),
        ({"draft_head": "auto", "draft_vocab_size": 16}, True),
        ({"draft_head": "auto", "draft_vocab_size": 17}, False),  # of 64 rows
        ({"draft_head": "traffic", "draft_vocab_size": 63}, True),
        ({"draft_head": "traffic", "draft_vocab_size": 64}, False),
        ({"draft_head": "low_rank", "draft_vocab_size": 64}, False),
        ({}, False),
    ],
)
def test_a_draft_gets_the_head_that_the_config_asks_for(tiny_llama, config, given):
    assert (head_of(tiny_llama(), **config) is not None) == given


@pytest.mark.parametrize(
    ("inner", "config", "size"),
    [
        (16, {}, 4096),
        (8192, {}, 8192),  # 196,608 numbers a layer beside 65,536 in 8,192 rows
        (16, {"draft_vocab_size": 5000}, 5000),
        (16, {"draft_head": "low_rank"}, 8192),
    ],
)
def test_by_default_a_draft_of_few_small_layers_computes_fewer_rows(inner, config, size):
    shape = {"vocab_size": 32768, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=inner))
    assert head_of(model, **config).vocabulary.size == size


def test_a_draft_whose_rows_cannot_be_chosen_keeps_its_own_head():
    assert head_of(BartForConditionalGeneration(BartConfig(**_BART)), draft_head="traffic", draft_vocab_size=8) is None


def test_the_next_calls_head_has_what_was_said_and_what_was_likely(tiny_llama):
    model = tiny_llama()
    head = head_of(model, draft_head="traffic", draft_vocab_size=4)
    head.observe(torch.tensor([50]), [60, 60], (torch.tensor([61, 62]), torch.tensor([0.9, 0.4])))
    rows, view = head.view(model, torch.tensor([33]))
    assert set(rows.ids.tolist()) == {50, 60, 61, 62, 33} - ({50} if 50 not in rows else set())
    assert view.get_output_embeddings() is rows
    assert 62 in rows


def test_a_projection_takes_the_sets_place_once_enough_states_were_seen(tiny_llama, monkeypatch):
    monkeypatch.setattr(draft_head, "_STATES", (8, 16))
    monkeypatch.setattr(draft_head, "_RANK", 32)
    made, make = [], draft_head.LowRank
    monkeypatch.setattr(draft_head, "LowRank", lambda *args: made.append(1) or make(*args))
    model = tiny_llama()
    head = head_of(model, draft_head="low_rank", draft_vocab_size=32)
    ids = torch.randint(64, (1, 6))
    kinds = []
    for _ in range(5):
        rows, view = head.view(model, ids[0])
        kinds.append(type(rows))
        view(input_ids=ids)
    assert kinds == [RowsHead, RowsHead, LowRankHead, LowRankHead, LowRankHead]
    assert len(made) == 2, "made anew once, and then kept"
    # Rank 32 is the hidden size: what it chooses are the likeliest tokens themselves.
    rows, view = head.view(model, ids[0])
    logits = view(input_ids=ids).logits[0]
    assert rows.ids.shape == (6, 4)
    whole = model(input_ids=ids).logits[0]
    assert DraftLogits(logits, rows.ids).likeliest().tolist() == whole.argmax(-1).tolist()
