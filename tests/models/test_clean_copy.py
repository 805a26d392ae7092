"""The copy of a given draft: it runs its own weights, whatever was wrapped round the draft, has all of them, and can read tokens; or it is refused."""

import copy
import logging
from types import MethodType

import accelerate
import pytest
import torch
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from hf_osd import OnlineAssistant, grow_draft

from ..served import logits, serve

LEARNS = {
    "update_interval": 10**6,
    "gate": False,
    "seed": 0,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "ema_decay": 0.0,
}


def compiled_forward(draft):
    draft.forward = torch.compile(draft.forward, backend="eager")
    return draft


def compiled(draft):
    return torch.compile(draft, backend="eager")


def compiled_layer(draft):
    draft.model.layers[0] = torch.compile(draft.model.layers[0], backend="eager")
    return draft


def compiled_in_place(draft):
    draft.compile(backend="eager")
    return draft


def data_parallel(draft):
    return nn.DataParallel(draft)


def both(draft):
    return nn.DataParallel(compiled(draft))


class Engine(nn.Module):
    """As engines of training libraries are."""

    def __init__(self, module):
        super().__init__()
        self.module, self.config = module, {"theirs": True}

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def in_an_engine(draft):
    return Engine(draft)


def hooked(draft):
    return accelerate.dispatch_model(draft, {"": "cpu"}, main_device="cpu", force_hooks=True)


def hooked_after_compiling(draft):
    return hooked(compiled_forward(draft))


def offloaded(draft):
    return accelerate.cpu_offload(draft, execution_device="cpu")


def prepared(draft):
    """As Accelerator.prepare leaves a model under mixed precision."""
    from accelerate.utils import convert_outputs_to_fp32

    draft._original_forward = draft.forward
    draft.forward = MethodType(torch.autocast("cpu", torch.bfloat16, enabled=False)(draft.forward.__func__), draft)
    draft.forward = MethodType(convert_outputs_to_fp32(draft.forward.__func__), draft)
    return draft


def trained_by_trl(draft):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(draft)
    return draft


PATCHES = [compiled_forward, compiled, compiled_layer, compiled_in_place, data_parallel, both, in_an_engine]
PATCHES += [hooked, hooked_after_compiling, offloaded, prepared, trained_by_trl]


@pytest.mark.parametrize("patch", PATCHES)
def test_what_is_wrapped_round_a_draft_is_left_out_of_a_copy_that_learns(target, draft, patch):
    given = patch(copy.deepcopy(draft))
    assistant = OnlineAssistant(given, **LEARNS)
    served = assistant.serving.active
    assert type(served) is LlamaForCausalLM
    assert not any("forward" in vars(module) or "_hf_hook" in vars(module) for module in served.modules())
    assert torch.equal(logits(served), logits(draft))
    serve(target, assistant)
    assert assistant.flush()
    assert assistant.stats.failed_updates == 0
    assert not torch.equal(logits(assistant.serving.active), logits(draft))
    assert all(p.grad is None for p in given.parameters())
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(logits(given), logits(draft)), "the given one is as it was, wrapper and weights"


def test_tied_ends_that_were_offloaded_are_tied_again(tiny_llama):
    plain = tiny_llama(tie_word_embeddings=True)
    own = OnlineAssistant(offloaded(copy.deepcopy(plain)), learn=False).serving.active
    assert own.lm_head.weight is own.model.embed_tokens.weight
    assert torch.equal(logits(own), logits(plain))


def test_a_draft_offloaded_to_disk_is_loaded(target, draft, tmp_path):
    given = accelerate.disk_offload(copy.deepcopy(draft), str(tmp_path), execution_device="cpu")
    assistant = OnlineAssistant(given, **LEARNS)
    assert torch.equal(logits(assistant.serving.active), logits(draft))
    assert all(p.is_meta for p in given.parameters()), "the given one stays on the disk"


def test_a_patch_bound_to_the_draft_goes_along_and_learns(target, draft):
    """It computes something else than the class does, and finds its own weights by `self`."""

    def sharper(self, *args, **kwargs):
        outputs = type(self).forward(self, *args, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs

    given = copy.deepcopy(draft)
    given.forward = MethodType(sharper, given)
    assistant = OnlineAssistant(given, **LEARNS)
    torch.testing.assert_close(logits(assistant.serving.active), 2 * logits(draft))
    serve(target, assistant)
    assert assistant.flush()
    assert not torch.equal(logits(assistant.serving.active), logits(given))
    assert all(p.grad is None for p in given.parameters())


def closure(draft):
    forward = draft.forward
    draft.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def closure_over_compiled(draft):
    forward = torch.compile(draft.forward, backend="eager")
    draft.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    logits(draft)


def closure_in_a_layer(draft):
    forward = draft.model.layers[0].mlp.forward
    draft.model.layers[0].mlp.forward = lambda *args: forward(*args)


def hook_that_runs_the_original(draft):
    layer = draft.model.layers[1]
    draft.model.norm.register_forward_hook(lambda module, inputs, output: layer.mlp(output))


@pytest.mark.parametrize("patch", [closure, closure_over_compiled, closure_in_a_layer, hook_that_runs_the_original])
@pytest.mark.parametrize("learn", [True, False])
def test_what_would_go_on_running_the_original_is_refused(draft, patch, learn):
    given = copy.deepcopy(draft)
    patch(given)
    with pytest.raises(ValueError, match=r"patched in the instance.*Load the draft anew"):
        OnlineAssistant(given, learn=learn)
    assert not any(module._forward_pre_hooks for module in given.modules())


def test_weights_that_are_not_there_are_refused(target, draft):
    given = copy.deepcopy(draft)
    given.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(ValueError, match=r"no values for 'model\.layers\.1\.mlp\.up_proj\.weight'.*meta device"):
        OnlineAssistant(given)


def test_weights_that_are_sharded_over_processes_are_refused(draft):
    from torch.distributed.fsdp import FSDPModule

    given = copy.deepcopy(draft)
    given.model.layers[0].__class__ = type("FSDPLayer", (FSDPModule, type(given.model.layers[0])), {})
    with pytest.raises(ValueError, match=r"sharded over processes \(FSDP\).*before it was prepared"):
        OnlineAssistant(given)
    given = copy.deepcopy(draft)
    empty = nn.Parameter(torch.zeros(0))
    empty.ds_id = 7
    given.model.norm.weight = empty
    with pytest.raises(ValueError, match=r"sharded over processes \(DeepSpeed ZeRO-3\)"):
        OnlineAssistant(given)


class NeedsAMask(LlamaForCausalLM):
    def forward(self, input_ids, attention_mask, **kwargs):
        return super().forward(input_ids, attention_mask.bool(), **kwargs)


def blip2():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = {**sizes, "intermediate_size": 48, "image_size": 16, "patch_size": 8}
    qformer = {**sizes, "intermediate_size": 48, "encoder_hidden_size": 32, "vocab_size": 64}
    text = {**sizes, "model_type": "opt", "vocab_size": 64, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return Blip2ForConditionalGeneration(
        Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=2)
    )


def openai_gpt():
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64))


def test_a_draft_that_cannot_read_tokens_alone_is_refused(tiny_llama):
    for bad, message in (
        (NeedsAMask(tiny_llama().config), r"NeedsAMask.*attention_mask"),
        (blip2(), r"Blip2ForConditionalGeneration.*pixel_values"),
        (openai_gpt(), r"OpenAIGPTLMHeadModel.*kept nothing in the cache"),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*choose a causal LM"):
            OnlineAssistant(bad)


def test_a_trained_model_that_is_compiled_refreshes(target, draft):
    trained = copy.deepcopy(draft)
    with torch.no_grad():
        trained.model.norm.weight.mul_(1.5)
    assistant = OnlineAssistant(grow_draft(target, (0, -1)))
    assistant.refresh(compiled(trained))
    assert torch.equal(logits(assistant.serving.active), logits(trained))


def test_a_draft_in_training_mode_stays_so_and_says_nothing(draft, caplog):
    given = copy.deepcopy(draft).train()
    with caplog.at_level(logging.WARNING):
        OnlineAssistant(given)
    assert given.training
    assert not caplog.records
