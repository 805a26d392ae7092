"""An adapter, or the weights under it, may be replaced by those that somebody else trained."""

import copy

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_osd import grow_draft

from ...served import GREEDY, PROMPTS, logits, serve
from .adapters import drawn, flushed, learning, same, snapshot


def test_a_plain_model_becomes_the_new_base(target, draft):
    assistant = flushed(target, draft)
    learner = assistant.learner.student.module
    trained = grow_draft(target, (0, 1))
    leased = assistant.serving.lease()
    before = snapshot(leased)
    assistant.refresh(trained)
    assert same(leased, before)
    assistant.serving.release(leased)
    assert same(assistant.serving.active, snapshot(trained))
    torch.testing.assert_close(logits(learner), logits(trained))
    assert not any(w.any() for name, w in assistant.serving.weights() if "lora_B" in name)
    with torch.no_grad():  # nor is it the storage of whoever trains it
        trained.model.layers[0].mlp.up_proj.weight.zero_()
    assert not same(assistant.serving.active, snapshot(trained))
    # And it goes on learning from there.
    for p in PROMPTS[:4]:
        assert torch.equal(serve(target, assistant, [p])[0], target.generate(p, **GREEDY))
    assert assistant.flush()
    torch.testing.assert_close(
        logits(assistant.serving.active), logits(_with_what_serves(assistant)), atol=1e-4, rtol=1e-4
    )


def _with_what_serves(assistant):
    """The draft with the adapter that serves beside its weights."""
    model = copy.deepcopy(assistant.adapter.draft)
    for name, w in assistant.serving.weights():
        model.get_parameter(name).data = w.clone()
    return model


def test_a_plain_model_that_has_changed_what_is_fixed_is_refused(target, draft):
    assistant = flushed(target, draft)
    before = snapshot(assistant.serving.active)
    trained = copy.deepcopy(draft)
    with torch.no_grad():
        trained.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match=r"lm_head.*freeze_embeddings=False"):
        assistant.refresh(trained)
    with pytest.raises(ValueError, match="lack"):
        assistant.refresh(grow_draft(target, (0,)))
    with torch.no_grad():
        trained.lm_head.weight.div_(2)
        trained.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        assistant.refresh(trained)
    assert same(assistant.serving.active, before)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_with_the_same_adapter_refreshes_it(target, draft, wrapped):
    assistant = learning(draft)
    weights = drawn(assistant.adapter)
    model = copy.deepcopy(assistant.adapter.with_weights(weights))
    if wrapped:
        model = PeftModel(copy.deepcopy(draft), assistant.adapter.draft.peft_config["default"])
        inner = model.get_base_model()
        for name, w in weights.items():
            inner.get_parameter(name).data = w.clone()
    assistant.refresh(model)
    assert all(torch.equal(w, weights[name]) for name, w in assistant.serving.weights())
    member = assistant.learner.student
    assert all(torch.equal(w, weights[name]) for name, w in member.weights().items())
    with torch.no_grad():
        dict(model.named_parameters())[next(n for n, _ in model.named_parameters() if "norm" in n)].mul_(2)
    with pytest.raises(ValueError, match=r"norm.*holds fixed"):
        assistant.refresh(model)


def test_under_inference_mode_it_serves_learns_and_refreshes(target, draft):
    with torch.inference_mode():
        assistant = learning(draft, warmup_steps=0)
        serve(target, assistant, PROMPTS[:5])
        assistant.refresh(draft)
        serve(target, assistant, PROMPTS[5:9])
    assert assistant.stats.updates >= 3
    assert assistant.stats.failed_updates == 0


@pytest.mark.parametrize("adapter", ["lora", "off"])
def test_a_draft_loaded_under_inference_mode_learns(target, tmp_path, adapter):
    grow_draft(target).save_pretrained(tmp_path)
    with torch.inference_mode():
        draft = AutoModelForCausalLM.from_pretrained(tmp_path)
        draft.requires_grad_(True)
    flushed(target, draft, adapter=adapter)
