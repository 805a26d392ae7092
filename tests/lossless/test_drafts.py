"""Kinds of draft: each serves with the target's own output, and learns where it can."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from hf_osd import OnlineAssistant, compare_outputs
from hf_osd.saving.drafts import load_draft

from .checks import SERVES_AT_ONCE

PROMPTS = torch.randint(2, 64, (6, 1, 6), generator=torch.Generator().manual_seed(3))
GREEDY = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
LEARNS = {"update_interval": 2, "learning_rate": 5e-3, **SERVES_AT_ONCE}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


def check_learns_in_service(served):
    """Three updates in six calls, and drafts that were right at times and wrong at times."""
    stats = served.stats
    assert (stats.updates, stats.failed_updates, stats.draft_version) == (3, 0, 3)
    assert 0 < stats.total.accepted < stats.total.tested


def wrapped_lora(target, noised_copy):
    return get_peft_model(noised_copy(target, 0.05), LoraConfig(task_type="CAUSAL_LM", **LORA))


def native_lora(target, noised_copy):
    draft = noised_copy(target, 0.05)
    draft.add_adapter(LoraConfig(**LORA), "topic")
    return draft


def in_train_mode_with_dropout(target, noised_copy):
    draft = noised_copy(target, 0.1)
    for layer in draft.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return draft.train()


def gradient_checkpointed(target, noised_copy):
    draft = noised_copy(target, 0.1)
    draft.gradient_checkpointing_enable()
    return draft.train()


def with_frozen_layers(target, noised_copy):
    draft = noised_copy(target, 0.1)
    draft.model.layers[0].requires_grad_(False)
    return draft


KINDS = [wrapped_lora, native_lora, in_train_mode_with_dropout, gradient_checkpointed, with_frozen_layers]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_draft_serve_and_learn(target, noised_copy, serve_as_plain, kind):
    draft = kind(target, noised_copy)
    before = {name: p.detach().clone() for name, p in draft.named_parameters()}
    check_learns_in_service(serve_as_plain(target, draft, PROMPTS, LEARNS))
    assert all(torch.equal(p, before[name]) for name, p in draft.named_parameters())  # the user's own is never written


def test_a_draft_from_disk(target, noised_copy, serve_as_plain, tmp_path):
    noised_copy(target, 0.1).save_pretrained(tmp_path)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_learns_in_service(serve_as_plain(target, draft, PROMPTS, LEARNS))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_tied_and_untied_heads(tiny_model, noised_copy, serve_as_plain, tied, freeze):
    target = tiny_model("Llama", tie_word_embeddings=tied)
    draft = noised_copy(target, 0.1)
    assert (draft.get_output_embeddings().weight is draft.get_input_embeddings().weight) == tied
    served = serve_as_plain(target, draft, PROMPTS, {**LEARNS, "freeze_embeddings": freeze})
    check_learns_in_service(served)
    active = served.assistant.serving.active
    head, embeddings = active.get_output_embeddings().weight, active.get_input_embeddings().weight
    assert (head is embeddings) == tied
    assert torch.equal(head, draft.get_output_embeddings().weight) == freeze


@pytest.mark.parametrize("kind", [wrapped_lora, native_lora])
def test_adapters_learn_and_their_base_does_not(target, noised_copy, serve_as_plain, kind):
    """Nor does what one assistant learns reach another on the same base."""
    draft = kind(target, noised_copy)
    one, other = (OnlineAssistant(draft, lookahead="constant", seed=0, **LEARNS) for _ in range(2))
    served = dict(other.serving.active.named_parameters())
    before = {name: p.clone() for name, p in served.items()}
    serve_as_plain(target, one, PROMPTS)
    assert one.stats.updates == 3
    assert all(torch.equal(p, before[name]) for name, p in served.items())
    for name, p in one.serving.active.named_parameters():
        assert torch.equal(p, before[name]) == ("lora_" not in name)
    serve_as_plain(target, other, PROMPTS[:2])


@pytest.mark.parametrize(
    ("of_target", "of_draft"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float32", "float16")]
)
def test_a_draft_in_another_dtype(tiny_model, noised_copy, of_target, of_draft):
    target = tiny_model("Llama").to(getattr(torch, of_target))
    draft = noised_copy(tiny_model("Llama"), 0.1).to(getattr(torch, of_draft))
    assistant = OnlineAssistant(draft, lookahead="constant", seed=0, **LEARNS | {"learning_rate": 1e-3})
    for prompt in PROMPTS:
        plain = target.generate(prompt, **GREEDY)
        output = target.generate(prompt, assistant_model=assistant, **GREEDY)
        assert compare_outputs(target, plain[0], output[0]) != "mismatch"
    assert (assistant.stats.updates, assistant.stats.failed_updates) == (2, 0)
    assert 0 < assistant.stats.total.accepted < assistant.stats.total.tested
    assert {p.dtype for p in assistant.serving.active.parameters()} == {getattr(torch, of_draft)}


@pytest.mark.parametrize("saved", ["float32", "bfloat16", "float16"])
def test_a_checkpoint_learns_in_the_dtype_it_was_saved_in(tiny_model, noised_copy, saved, tmp_path):
    """It serves as it came, is learnt in float32, and α stays a number."""
    target, dtype = tiny_model("Llama"), getattr(torch, saved)
    noised_copy(target, 0.1).to(dtype).save_pretrained(tmp_path / "brought")
    assistant = OnlineAssistant(
        load_draft(tmp_path / "brought"), lookahead="constant", seed=0, **LEARNS | {"learning_rate": 1e-3}
    )
    before = {name: weight.clone() for name, weight in assistant.serving.weights()}
    for prompt in PROMPTS:
        plain = target.generate(prompt, **GREEDY)
        assert torch.equal(plain, target.generate(prompt, assistant_model=assistant, **GREEDY))
    assistant.flush()
    assert assistant.stats.updates > 0
    assert assistant.stats.failed_updates == 0
    assert 0 < assistant.stats.total.alpha < 1
    assert all(overlap.isfinite().all() for overlap in assistant.score(assistant.buffer.requests()))
    assert {p.dtype for p in assistant.serving.active.parameters()} == {dtype}
    assert any(not torch.equal(before[name], weight) for name, weight in assistant.serving.weights())
    assistant.save_pretrained(tmp_path / "learnt")
    assert load_draft(tmp_path / "learnt").dtype == dtype


@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="no quantized kernels on this platform")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_an_8_bit_draft_serves_frozen(target, noised_copy, serve_as_plain):
    draft = torch.ao.quantization.quantize_dynamic(noised_copy(target, 0.05), {nn.Linear}, dtype=torch.qint8)
    assert not isinstance(draft.model.layers[0].mlp.up_proj, nn.Linear)
    served = serve_as_plain(target, draft, PROMPTS, {"learn": False})
    assert 0 < served.stats.total.accepted < served.stats.total.tested


def test_an_8_bit_base_learns_in_its_adapters(target, noised_copy, serve_as_plain):
    """Weights kept as int8 and a scale, as quantizers do; the adapters on top are float32."""
    draft = noised_copy(target, 0.05)
    for layer in draft.model.layers:
        layer.mlp.up_proj = EightBit(layer.mlp.up_proj)
    draft = get_peft_model(draft, LoraConfig(task_type="CAUSAL_LM", **LORA))
    served = serve_as_plain(target, draft, PROMPTS, LEARNS)
    check_learns_in_service(served)
    assert all("lora_" in name for name in served.assistant.serving.trainable)


class EightBit(nn.Module):
    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(-1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale.to(x.dtype)).mT


def test_the_target_itself_as_its_draft(target, serve_as_plain):
    """Passed as it is, it is copied: learning must not reach the target."""
    before = copy.deepcopy(target.state_dict())
    served = serve_as_plain(target, target, PROMPTS, LEARNS)
    assert served.stats.updates == 3
    assert all(torch.equal(p, before[name]) for name, p in target.state_dict().items())
