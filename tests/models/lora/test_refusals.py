"""Adapters that cannot serve are refused whole; and layers that are quantised, over which an adapter serves beside them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.models.lora import Adapter

from ...served import GREEDY, PROMPTS, logits, serve
from .adapters import drawn, learning, same, snapshot


def spoilt(adapter, value):
    weights = drawn(adapter)
    name = next(name for name in weights if "lora_B" in name)
    weights[name] = torch.full_like(weights[name], value)
    return weights


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_is_not_finite_is_refused_whole(draft, value):
    adapter = Adapter(draft, 4)
    serving = HotSwapDraft(draft, set(), adapter)
    serving.refresh(drawn(adapter))
    active, before, learnt = serving.active, snapshot(serving.active), dict(serving.weights())
    with pytest.raises(ValueError, match=r"lora_B.*not finite"):
        serving.refresh(spoilt(adapter, value))
    assert (serving.active, serving.version) == (active, 1)
    assert same(active, before)
    assert dict(serving.weights()).keys() == learnt.keys()


def test_an_adapter_whose_merge_overflows_is_refused_whole(draft):
    """The adapter is finite, in float32; what it makes of the draft's float16 weights is not."""
    given = copy.deepcopy(draft).to(torch.float16)
    adapter = Adapter(given, 4)
    serving = HotSwapDraft(given, set(), adapter)
    active, before = serving.active, snapshot(serving.active)
    last = [name for name in adapter.weights() if "lora_B" in name][-1]  # those before it are merged by then
    weights = drawn(adapter)
    weights[last] = torch.full_like(weights[last], 1e6)
    with pytest.raises(ValueError, match=r"down_proj.weight' has values that are not finite"):
        serving.refresh(weights)
    assert (serving.active, serving.version) == (active, 0)
    assert same(active, before)
    serving.refresh(good := drawn(adapter, seed=1))
    expected = dict(adapter.merged(good))
    assert all(torch.equal(p, expected[n]) for n, p in serving.active.named_parameters() if n in expected)


def test_an_adapter_of_another_rank_is_refused(draft):
    adapter = Adapter(draft, 4)
    serving = HotSwapDraft(draft, set(), adapter)
    with pytest.raises(ValueError, match="lora_A"):
        serving.refresh(Adapter(draft, 2).weights())


def test_a_draft_without_layers_that_can_have_one_is_refused(target, monkeypatch):
    draft = grow_draft(target)
    monkeypatch.setattr("hf_osd.models.lora.adaptable", lambda *args: {})
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear layer .*adapter='off'"):
        OnlineAssistant(draft, adapter="lora")
    assert OnlineAssistant(draft).adapter is None


class EightBit(nn.Linear):
    """A linear layer with weights kept as int8 and a scale a row, as quantisers do."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        scale = linear.weight.detach().abs().amax(-1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def quantised(draft):
    for layer in draft.model.layers:
        for parent in (layer.mlp, layer.self_attn):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(parent, name, EightBit(module))
    return draft


@pytest.mark.parametrize("adapter", ["auto", "lora"])
def test_over_quantised_layers_the_adapter_serves_beside_them(target, noised_copy, adapter):
    draft = quantised(noised_copy(target, 0.05))
    before = snapshot(draft)
    plain = [target.generate(p, **GREEDY) for p in PROMPTS]
    assistant = learning(draft, adapter=adapter, warmup_steps=0)
    base = {p.data_ptr() for name, p in assistant.serving.active.named_parameters() if "lora_" not in name}
    for a, b in zip(serve(target, assistant), plain, strict=True):
        assert torch.equal(a, b)
    assert assistant.stats.updates >= 3
    assert assistant.stats.failed_updates == 0
    served = assistant.serving.active
    assert {p.data_ptr() for name, p in served.named_parameters() if "lora_" not in name} == base
    assert not torch.equal(logits(assistant.serving.active), logits(draft))
    assert same(draft, before)
    with pytest.raises(ValueError, match="Refresh from a model with the adapter"):
        assistant.refresh(draft)


def test_a_process_cannot_learn_over_quantised_layers(target, noised_copy):
    with pytest.raises(ValueError, match="learn='background'"):
        learning(quantised(noised_copy(target, 0.05)), learn="process")


def test_an_adapter_on_a_quantised_head_is_refused_and_serves_frozen(target, noised_copy):
    from peft import LoraConfig, get_peft_model

    draft = noised_copy(target, 0.05)
    draft.lm_head = EightBit(draft.lm_head)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], task_type="CAUSAL_LM")
    draft = get_peft_model(draft, config, autocast_adapter_dtype=False)
    with pytest.raises(ValueError, match=r"LM head, a EightBit whose weights are quantised.*exclude_modules"):
        OnlineAssistant(draft)
    frozen = OnlineAssistant(draft, learn=False)
    assert torch.equal(serve(target, frozen, PROMPTS[:1])[0], target.generate(PROMPTS[0], **GREEDY))
