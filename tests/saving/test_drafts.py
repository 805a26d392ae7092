"""`grow_draft` on every family that needs something of its own: tied ends, learned positions, layer types, buffers."""

import copy

import accelerate
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    Blip2Config,
    Blip2ForConditionalGeneration,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    OPTConfig,
    ProphetNetConfig,
    ProphetNetForCausalLM,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForCausalLM,
)

from hf_osd import OnlineAssistant
from hf_osd.models.blueprint import depth_of
from hf_osd.saving.drafts import grow_draft

TOKENS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SHAPE = TOKENS | {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 128}
GATED = SHAPE | {"intermediate_size": 64, "num_key_value_heads": 2}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

# The inputs below are longer than the windows, so that a layer of the wrong type answers otherwise.
CONFIGS = {
    "llama": lambda: LlamaConfig(**GATED),
    "llama_tied": lambda: LlamaConfig(**GATED, tie_word_embeddings=True),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE, intermediate_size=64),
    "opt": lambda: OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=16),
    "qwen2": lambda: Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, layer_types=MIXED),
    "qwen3": lambda: Qwen3Config(**GATED, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**GATED, head_dim=8, sliding_window=8, layer_types=MIXED),
    "mistral": lambda: MistralConfig(**GATED, sliding_window=8),
}
IDS = torch.arange(4, 28)[None]


def target_of(config, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # flat logits and norms of 1 would hide what is missing
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=CONFIGS)
def target(request):
    return target_of(CONFIGS[request.param]())


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def decoder_layers(model):
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return next(m for m in lists if len(m) == model.config.num_hidden_layers)


def pointers(module):
    return [p.data_ptr() for p in module.parameters()]


def test_its_layers_are_the_targets_in_the_order_given(target):
    draft = grow_draft(target, [2, -3])
    assert draft.config.num_hidden_layers == len(decoder_layers(draft)) == 2
    for grown, picked in zip(decoder_layers(draft), (2, 0), strict=True):
        given = dict(decoder_layers(target)[picked].named_parameters())
        for name, parameter in grown.named_parameters():
            assert torch.equal(parameter, given[name]), name
            assert parameter.data_ptr() != given[name].data_ptr(), "a copy, not the target's own"
    kinds = getattr(target.config, "layer_types", None)
    if kinds is not None:
        assert draft.config.layer_types == [kinds[2], kinds[0]]


def test_its_ends_are_the_targets_own_storage_frozen_and_all_else_trains(target):
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in target.named_parameters()}
    draft = grow_draft(target, [0, -1])
    ends = [p for end in (draft.get_input_embeddings(), draft.get_output_embeddings()) for p in end.parameters()]
    assert pointers(draft.get_input_embeddings()) == pointers(target.get_input_embeddings())
    assert pointers(draft.get_output_embeddings()) == pointers(target.get_output_embeddings())
    assert not any(p.requires_grad for p in ends)
    frozen = set(map(id, ends))
    others = [p for p in draft.parameters() if id(p) not in frozen]
    assert others
    assert all(p.requires_grad for p in others)
    with torch.no_grad():
        for parameter in others:
            parameter.add_(1.0)
    for name, parameter in target.named_parameters():
        assert parameter.requires_grad == before[name][0], name
        assert torch.equal(parameter, before[name][1]), name


def test_with_all_layers_it_is_the_target(target):
    """A buffer, norm or projection that did not come along answers otherwise."""
    assert torch.equal(logits(grow_draft(target, range(3))), logits(target))


def test_saved_it_is_a_plain_checkpoint(target, tmp_path):
    draft = grow_draft(target, [1, -1])
    said = logits(draft)
    assert not torch.equal(said, logits(target))
    draft.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(target)
    assert torch.equal(logits(loaded), said)
    loaded.save_pretrained(tmp_path / "again")
    files = [load_file(path / "model.safetensors") for path in (tmp_path, tmp_path / "again")]
    assert files[0].keys() == files[1].keys(), "no buffer is saved that a model of its own would not save"


def test_it_trains_without_touching_the_target(target):
    draft, before = grow_draft(target, [0]), logits(target)
    draft(input_ids=IDS).logits.logsumexp(-1).mean().backward()
    trained = [p for p in draft.parameters() if p.requires_grad and p.grad is not None]
    assert trained
    torch.optim.SGD(trained, lr=1.0).step()
    assert torch.equal(logits(target), before)
    assert all(p.grad is None for p in target.parameters())


def test_a_frozen_target_grows_a_draft_that_trains():
    target = target_of(CONFIGS["llama"]()).requires_grad_(False)
    draft = grow_draft(target)
    assert all(p.requires_grad for p in decoder_layers(draft).parameters())
    assert not any(p.requires_grad for p in target.parameters())


def test_it_can_be_grown_and_trained_under_inference_mode():
    """Parameters made there could never be written or trained again."""
    target = target_of(CONFIGS["llama"]())
    with torch.inference_mode():
        draft = grow_draft(target)
    draft(input_ids=IDS).logits.logsumexp(-1).mean().backward()
    assert all(p.grad is not None for p in decoder_layers(draft).parameters())


def test_it_has_the_targets_dtype_mode_and_generation_settings():
    target = target_of(CONFIGS["llama"]()).to(torch.bfloat16).train()
    target.generation_config.eos_token_id = [1, 7]
    draft = grow_draft(target)
    assert draft.dtype == torch.bfloat16
    assert not draft.training
    assert draft.generation_config.eos_token_id == [1, 7]
    assert draft.generation_config is not target.generation_config


def test_token_ids_are_not_taken_for_a_list_with_an_entry_a_layer():
    """Three end-of-sequence tokens and three layers, as Llama 3 has ends: the draft would forget one."""
    config = LlamaConfig(**GATED | {"eos_token_id": [1, 2, 3]})
    config.architectures = ["LlamaForCausalLM"]
    assert grow_draft(target_of(config), [0]).config.eos_token_id == [1, 2, 3]
    one_layer = LlamaConfig(**GATED | {"num_hidden_layers": 1, "eos_token_id": [1]})
    assert grow_draft(target_of(one_layer), [0, 0]).config.eos_token_id == [1]


def test_the_target_keeps_its_config():
    target = target_of(CONFIGS["gemma3"]())
    grow_draft(target, [0])
    assert target.config.num_hidden_layers == 3
    assert target.config.layer_types == MIXED


@pytest.mark.parametrize("layers", [[], [3], [-4], [0, 7]])
def test_layers_that_are_not_there_are_refused(tiny_llama, layers):
    with pytest.raises(ValueError, match="at least one index from -3 to 2"):
        grow_draft(tiny_llama(layers=3), layers)


def test_layers_of_unlike_kinds_are_refused_by_name():
    """A dense layer in the place of a sparse one: upstream decides by index which is which."""
    config = Qwen2MoeConfig(
        **GATED, mlp_only_layers=[0], num_experts=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    )
    target = target_of(config)
    with pytest.raises(ValueError, match=r"mlp.* has no counterpart in Qwen2MoeForCausalLM.*such as \[0, 1\]"):
        grow_draft(target, [0, 0])
    assert grow_draft(target, [0, 1])


def test_an_encoder_decoder_is_refused():
    config = T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration.*decoder-only"):
        grow_draft(T5ForConditionalGeneration(config))


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match=r"LlamaModel.*LM head"):
        grow_draft(LlamaModel(LlamaConfig(**GATED)))


# Targets with something that is not in their layers, or whose layers are somewhere else.

SIX = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
SIX |= {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
PACKED = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
SEES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SEES |= {"image_size": 16, "patch_size": 4}
SIDES = {"vocab_size": 64, "d_model": 32, "encoder_layers": 4, "decoder_layers": 3, "decoder_ffn_dim": 48}
SIDES |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48}


def gemma4(shared=2, **config):
    return AutoModelForCausalLM.from_config(
        Gemma4TextConfig(**SIX, **PACKED, num_kv_shared_layers=shared, use_double_wide_mlp=True, **config)
    )


def gemma3n():
    sparse = {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6}
    return AutoModelForCausalLM.from_config(Gemma3nTextConfig(**SIX, **PACKED, **sparse, num_kv_shared_layers=2))


def gemma3_that_sees():
    text = {k: v for k, v in SIX.items() if k != "layer_types"}
    return AutoModelForCausalLM.from_config(
        Gemma3Config(text_config=text, vision_config=SEES, mm_tokens_per_image=4, image_token_id=62)
    )


def llava():
    parts = {"text_config": LlamaConfig(**GATED), "vision_config": CLIPVisionConfig(**SEES)}
    return LlavaForConditionalGeneration(LlavaConfig(**parts, image_token_index=63))


def blip2():
    text = TOKENS | {"model_type": "opt", "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "word_embed_proj_dim": 32}
    reads = {k: v for k, v in SEES.items() if "size" not in k} | {"hidden_size": 32, "encoder_hidden_size": 32}
    config = Blip2Config(
        vision_config=SEES, qformer_config={**reads, "vocab_size": 64}, text_config=text, num_query_tokens=2
    )
    return Blip2ForConditionalGeneration(config)


def bart_decoder():
    return BartForCausalLM(BartConfig(**SIDES))


def whisper_decoder():
    return WhisperForCausalLM(WhisperConfig(**SIDES | TOKENS, num_mel_bins=8, decoder_start_token_id=1))


def prophetnet_decoder():
    sides = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    layers = {"num_encoder_layers": 3, "num_decoder_layers": 3}
    heads = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}
    return ProphetNetForCausalLM(ProphetNetConfig(vocab_size=64, hidden_size=32, **sides, **layers, **heads))


UNUSUAL = [gemma4, gemma3n, gemma3_that_sees, llava, blip2, bart_decoder, whisper_decoder, prophetnet_decoder]


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = make().eval()
        with torch.no_grad():
            for parameter in target.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return target


@pytest.mark.parametrize("make", UNUSUAL)
def test_unusual_targets_grow_a_draft_that_is_theirs(make, tmp_path):
    target = made(make)
    whole = grow_draft(target, range(depth_of(target)))
    text = target.language_model if make is blip2 else target
    torch.testing.assert_close(logits(whole), logits(text), rtol=1e-4, atol=1e-4)
    draft = grow_draft(target)
    ends = [p for end in (draft.get_input_embeddings(), draft.get_output_embeddings()) for p in end.parameters()]
    assert {p.data_ptr() for p in ends} <= {p.data_ptr() for p in text.parameters()}
    assert not any(p.requires_grad for p in ends)
    draft.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(draft))


@pytest.mark.parametrize("make", [gemma4, gemma3n, gemma3_that_sees, llava, bart_decoder, whisper_decoder])
def test_drafts_of_unusual_targets_serve_and_learn(make):
    target = made(make)
    assistant = OnlineAssistant(grow_draft(target), update_interval=1, lookahead="constant", learning_budget=1.0)
    ask = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    for start in range(2, 5):
        prompt = torch.arange(start, start + 6)[None]
        assert torch.equal(target.generate(prompt, **ask), target.generate(prompt, assistant_model=assistant, **ask))
    assistant.flush()
    assert assistant.stats.total.drafted > 0
    assert assistant.stats.updates > 0
    assert assistant.stats.failed_updates == 0


def test_a_table_with_a_part_a_layer_comes_in_the_parts_of_its_layers_and_does_not_train():
    target = made(gemma4)
    table = target.model.embed_tokens_per_layer.weight.unflatten(1, (6, 8))
    draft = grow_draft(target, (1, 3))
    assert torch.equal(draft.model.embed_tokens_per_layer.weight, table[:, [1, 3]].flatten(1))
    assert not draft.model.embed_tokens_per_layer.weight.requires_grad, "it has a row a token, as the ends have"
    assert draft.model.per_layer_model_projection.weight.requires_grad


def test_layers_that_read_others_keys_need_such_before_them():
    target = made(gemma4)
    draft = grow_draft(target, (2, 3, 4, 5))
    assert draft.config.num_kv_shared_layers == 2
    for layers in ((0, 5), (4, 5), (5, 1)):
        with pytest.raises(ValueError, match=r"Gemma4ForCausalLM.*such as \[0, 1\]"):
            grow_draft(target, layers)


def offloaded(target, folder):
    return accelerate.cpu_offload(target, execution_device="cpu")


def on_disk(target, folder):
    return accelerate.disk_offload(target, str(folder), execution_device="cpu")


def in_part(target, folder):
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk"}
    places |= {"model.layers.1": "disk", "model.layers.2": "disk", "lm_head": "disk"}
    return accelerate.dispatch_model(target, places, main_device="cpu", offload_dir=str(folder))


@pytest.mark.parametrize(
    ("away", "tied"),
    [(offloaded, False), (offloaded, True), (on_disk, False), (on_disk, True), (in_part, False)],
)
def test_what_accelerate_keeps_elsewhere_is_loaded(tiny_llama, away, tied, tmp_path):
    whole = tiny_llama(layers=3, tie_word_embeddings=tied)
    grown = grow_draft(away(copy.deepcopy(whole), tmp_path), (0, -1))
    assert torch.equal(logits(grown), logits(grow_draft(whole, (0, -1))))
    assert (grown.lm_head.weight is grown.model.embed_tokens.weight) == tied
    assert not grown.lm_head.weight.requires_grad
    assert not any(hasattr(module, "_hf_hook") for module in grown.modules())


def test_a_target_that_is_offloaded_in_part_is_served(tiny_llama, tmp_path):
    target = in_part(tiny_llama(layers=3), tmp_path)
    assistant = OnlineAssistant(grow_draft(target), lookahead="constant", learn=False)
    ask = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(target.generate(IDS, **ask), target.generate(IDS, assistant_model=assistant, **ask))
    assert assistant.stats.total.drafted > 0


def test_targets_without_values_of_their_own_are_refused(tiny_llama):
    hollow, adapted, quantised = (tiny_llama() for _ in range(3))
    hollow.model.layers[0].to("meta")
    from peft import LoraConfig

    adapted.add_adapter(LoraConfig(target_modules=["q_proj"]), "topic")
    quantised.hf_quantizer = object()
    sees = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=GATED | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            vision_config={"embed_dim": 32, "depth": 1, "num_heads": 4, "hidden_size": 32},
        )
    )
    for target, message in (
        (hollow, r"model\.layers\.0.*has no values.*Load the model whole"),
        (adapted, r"with an adapter.*merge_and_unload"),
        (quantised, r"quantised LlamaForCausalLM.*dequantize"),
        (sees, r"no separate class.*Qwen2VLTextConfig.*Load a small text model"),
    ):
        with pytest.raises(ValueError, match=message):
            grow_draft(target)


def test_a_compiled_target_grows_a_plain_draft(tiny_llama):
    target = tiny_llama(layers=3)
    draft = grow_draft(torch.compile(target, backend="eager"))
    assert torch.equal(logits(draft), logits(grow_draft(target)))
