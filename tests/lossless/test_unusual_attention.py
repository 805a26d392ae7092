"""Targets whose attention is unusual are served exactly: sinks (gpt-oss), caches that layers share (Gemma 3n and 4), positions of an image that go on in the text (Qwen3-VL), and
convolutions between attention layers (LFM2)."""

import pytest
import torch
import transformers

from hf_osd import grow_draft, grow_feature_draft
from recipes.checks.recurrent import SIZES, random_model

from .test_recurrent import N, assistant_of, attention_draft, check, prompts

_HEADS = {"head_dim": 8, "max_position_embeddings": 128}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
# The last two layers read keys and values of the first two.
_SHARED = {
    **_HEADS,
    **_WINDOWS,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
SERVED = {
    "GptOssForCausalLM": {**_HEADS, **_WINDOWS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma3nForCausalLM": {**_SHARED, "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4},
    "Gemma4ForCausalLM": {**_SHARED, "global_head_dim": 8},
    "Qwen3VLForConditionalGeneration": {
        "text_config": {**SIZES, **_HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "deepstack_visual_indexes": [0],
            "patch_size": 2, "temporal_patch_size": 1, "spatial_merge_size": 1, "num_position_embeddings": 16,
        },
        "image_token_id": 63, "vision_start_token_id": 62, "vision_end_token_id": 61, "video_token_id": 60,
    },
    "Lfm2ForCausalLM": _CONVOLUTIONS,
    "Lfm2MoeForCausalLM": {**_CONVOLUTIONS, **_EXPERTS, "num_dense_layers": 2},
}  # fmt: skip


def made(name, **values):
    kind, given = getattr(transformers, name), {**SERVED[name], **values}
    model = random_model(kind, kind.config_class(**(given if "text_config" in given else {**SIZES, **given})))
    if name == "Gemma4ForCausalLM":  # else what attention adds is too small to matter, and no error of the cache shows
        for layer in model.model.layers:
            torch.nn.init.constant_(layer.post_attention_layernorm.weight, 16.0)
    return model


@pytest.mark.parametrize("tries", [True, False])
@pytest.mark.parametrize("name", SERVED)
def test_the_cache_alone_drafts_exactly(name, tries):
    stats = check(made(name), assistant_of(verify_target=tries), prompts(3), min_new_tokens=N)
    assert stats.total.accepted > 0
    assert stats.total.refed_tokens == 0


# Qwen3-VL's text model has no class of its own, from which a draft could be grown; Gemma 3n has several states a position.
GROWN = [name for name in SERVED if name != "Qwen3VLForConditionalGeneration"]
LEARN = [("attention", name) for name in SERVED] + [("grown", name) for name in GROWN]
LEARN += [("feature", name) for name in GROWN if name != "Gemma3nForCausalLM"]


@pytest.mark.parametrize(("kind", "name"), LEARN)
def test_what_is_served_while_drafts_learn_is_plain_decodings(tiny_llama, name, kind):
    target = made(name)
    if kind == "attention":
        draft = attention_draft(tiny_llama, target)
    else:
        draft = grow_draft(target, [0, 1]) if kind == "grown" else grow_feature_draft(target, seed=0)
    stats = check(target, assistant_of(draft, learning_rate=2e-2), prompts(4), min_new_tokens=N)
    assert stats.updates >= 3
    assert stats.failed_updates == 0
    assert stats.total.drafted_by["draft"] > 0


@pytest.mark.parametrize("name", GROWN)
def test_a_grown_draft_that_does_not_learn_serves_exactly(name):
    target = made(name)
    check(target, assistant_of(grow_draft(target, [0, 1]), learn=False), prompts(2), min_new_tokens=N)


@pytest.mark.parametrize("grow", [grow_draft, grow_feature_draft])
def test_no_draft_is_grown_from_a_text_model_without_a_class_of_its_own(grow):
    with pytest.raises(
        ValueError, match=r"Qwen3VLForConditionalGeneration.*no separate class.*Load a small text model"
    ):
        grow(made("Qwen3VLForConditionalGeneration"))


def test_no_feature_draft_is_grown_from_several_states_a_position():
    with pytest.raises(ValueError, match=r"Gemma3nForCausalLM.*4 states a position.*grow_draft"):
        grow_feature_draft(made("Gemma3nForCausalLM"))


@pytest.mark.parametrize("drafts", [True, False])
def test_positions_of_an_image_go_on_in_the_text(tiny_llama, drafts):
    """After an image of 4x4 patches a position is 12 less than the tokens before it: the rope delta, which a call for text between must not inherit."""
    target = made("Qwen3VLForConditionalGeneration")
    assistant = assistant_of(attention_draft(tiny_llama, target) if drafts else None)
    asked, texts = {"max_new_tokens": N, "do_sample": False}, prompts(3)
    for seed, text in enumerate(texts):
        prompt = torch.tensor([[5, 9, 62, *[63] * 16, 61, 7 + seed, 12]])
        image = {"image_grid_thw": torch.tensor([[1, 4, 4]]), "mm_token_type_ids": (prompt == 63).int()}
        patches = torch.randn(2, 16, 12, generator=torch.Generator().manual_seed(seed))
        plain, other = (target.generate(prompt, pixel_values=pixels, **image, **asked) for pixels in patches)
        assert not torch.equal(plain, other), "the image matters"
        for _ in range(2):
            output = target.generate(prompt, pixel_values=patches[0], assistant_model=assistant, **image, **asked)
            assert torch.equal(output, plain)
            assert int(target.model.rope_deltas) == -12
            output = target.generate(text, assistant_model=assistant, **asked)
            assert torch.equal(output, target.generate(text, **asked))
    total = assistant.stats.total
    assert total.plain_requests == 0
    assert 0 < total.accepted < total.tested
