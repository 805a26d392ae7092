"""Drafts that learn in a LoRA adapter of hf_osd's own, over weights that stay, which the serving copies have in theirs."""

import copy
import gc
import itertools
import logging
import weakref

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.learning import memory
from hf_osd.models.copies import embedding_names
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.models.lora import Adapter, adaptable
from hf_osd.models.plain import merged as merged_by_peft

from ..served import GREEDY, PROMPTS, serve

LORA = {"learning_budget": 1.0, "adapter": "lora", "lora": 4, "gate": False, "seed": 0, "learning_rate": 1e-2}


def learning(draft, **fields):
    return OnlineAssistant(draft, **{**LORA, "update_interval": 2} | fields)


def flushed(target, draft, prompts=PROMPTS[:6], **fields):
    """An assistant that has learnt from some requests, once."""
    assistant = learning(draft, **{"update_interval": 10**6} | fields)
    serve(target, assistant, prompts)
    assert assistant.flush()
    return assistant


def drawn(adapter, scale=0.1, seed=0):
    """Weights of an adapter that does something."""
    random = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(p.shape, generator=random) for name, p in adapter.weights().items()}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def storage(model):
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def logits(model, ids=PROMPTS[0]):
    with torch.no_grad():
        return model(input_ids=ids).logits


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128)).eval()


def mixtral():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=1)).eval()


# The promise.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learn", ["inline", "background"])
def test_output_is_the_targets_own_while_an_adapter_learns(target, draft, dtype, learn):
    plain = [target.generate(p, **GREEDY) for p in PROMPTS]
    assistant = learning(copy.deepcopy(draft).to(dtype), learn=learn, warmup_steps=0)
    for a, b in zip(serve(target, assistant), plain, strict=True):
        assert torch.equal(a, b)
    assistant.flush()
    stats = assistant.stats
    assert stats.updates >= 1
    assert stats.failed_updates == 0
    assert not all(torch.equal(w, assistant.adapter.weights()[name]) for name, w in assistant.serving.weights())
    assistant.close()


@pytest.mark.parametrize("make", [gpt2, mixtral, t5])
def test_other_architectures_learn_in_an_adapter_too(make, noised_copy):
    other = make()
    plain = [other.generate(p, **GREEDY) for p in PROMPTS[:6]]
    assistant = learning(noised_copy(other, 0.1), warmup_steps=0)
    for a, b in zip(serve(other, assistant, PROMPTS[:6]), plain, strict=True):
        assert torch.equal(a, b)
    assistant.flush()
    assert (assistant.stats.updates >= 2, assistant.stats.failed_updates) == (True, 0)
    assert any(w.any() for name, w in assistant.serving.weights() if "lora_B" in name)


def test_it_learns_what_the_target_says(target, noised_copy):
    draft = noised_copy(target, 0.3)
    assistant = learning(draft, update_interval=10**6, lookahead="constant", suffix_cache=False, replay_ratio=0.0)
    for _ in range(6):
        serve(target, assistant)
        assistant.flush()
    before = OnlineAssistant(draft, learn=False, lookahead="constant", suffix_cache=False)
    after = OnlineAssistant(assistant.serving.active, learn=False, lookahead="constant", suffix_cache=False)
    for one in (before, after):
        serve(target, one)
    assert after.stats.total.alpha > before.stats.total.alpha + 0.05


def test_neither_draft_nor_target_is_written(target):
    draft = grow_draft(target, (0, -1))
    befores = [snapshot(model) for model in (draft, target)]
    flushed(target, draft)
    assert all(same(model, before) for model, before in zip((draft, target), befores, strict=True))
    assert not hasattr(draft, "peft_config")


def test_a_users_training_of_the_draft_reaches_serving_by_refreshes_alone(target):
    draft = grow_draft(target, (0, -1))
    assistant = learning(draft)
    before = logits(assistant.serving.active)
    with torch.no_grad():
        draft.model.layers[0].mlp.up_proj.weight.mul_(2)
    assert torch.equal(logits(assistant.serving.active), before)
    assistant.refresh(draft)
    torch.testing.assert_close(logits(assistant.serving.active), logits(draft))


# What is merged.


@pytest.mark.parametrize("make", [gpt2, mixtral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_serves_is_what_peft_merges(make, dtype):
    draft = make().to(dtype)
    adapter = Adapter(draft, 3)
    weights = drawn(adapter)
    serving = HotSwapDraft(draft, set(), adapter)
    serving.refresh(weights)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    by_peft = dict(merged_by_peft(adapter.with_weights(weights)).named_parameters())
    assert by_peft.keys() == {name for name, _ in serving.active.named_parameters()}
    changed = 0
    for name, p in serving.active.named_parameters():
        torch.testing.assert_close(p, by_peft[name].to(dtype), atol=tolerance, rtol=tolerance)
        changed += not torch.equal(p, dict(draft.named_parameters())[name])
    assert changed == len(adapter.modules)


def test_an_adapter_that_has_learnt_nothing_serves_the_draft_as_it_is(draft):
    for dtype in (torch.float32, torch.bfloat16):
        given = copy.deepcopy(draft).to(dtype)
        adapter = Adapter(given, 4)
        serving = HotSwapDraft(given, set(), adapter)
        serving.refresh(adapter.weights())
        assert same(serving.active, snapshot(given))


def test_head_embeddings_and_norms_get_no_adapter(tiny_llama):
    for model in (tiny_llama(tie_word_embeddings=True), tiny_llama(), gpt2(), mixtral()):
        adapted = set(adaptable(model))
        assert adapted
        assert not {f"{name}.weight" for name in adapted} & embedding_names(model)
        assert "lm_head" not in adapted
        assert all(model.get_parameter(f"{name}.weight").dim() == 2 for name in adapted)


def test_both_stacks_of_an_encoder_decoder_get_one():
    model = t5()
    adapter = Adapter(model, 2)
    assert {name.split(".")[0] for name in adapter.modules} == {"encoder", "decoder"}
    assert adapter.draft.peft_config["default"].task_type == "SEQ_2_SEQ_LM"


def test_layers_that_a_user_has_frozen_get_none(target):
    draft = grow_draft(target, (0, -1))
    draft.model.layers[0].requires_grad_(False)
    assistant = learning(draft)
    assert assistant.adapter.modules
    assert all(name.startswith("model.layers.1.") for name in assistant.adapter.modules)


def test_a_draft_that_is_frozen_whole_can_learn_in_an_adapter_if_asked(target):
    draft = grow_draft(target, (0, -1)).requires_grad_(False)
    with pytest.raises(ValueError, match="adapter='lora'"):
        OnlineAssistant(draft)
    before = snapshot(draft)
    assistant = flushed(target, draft)
    assert not same(assistant.serving.active, before)
    assert same(draft, before)


def test_all_begin_with_the_same_adapter_and_the_random_state_is_left_alone(draft):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    weights = [Adapter(draft, 4, seed).weights() for seed in (None, None, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())
    assert any(not torch.equal(p, weights[2][name]) for name, p in weights[0].items())
    assert all((name.split(".")[-3] == "lora_A") == bool(p.any()) for name, p in weights[0].items())


# What is shared.


def test_serving_copy_learner_and_draft_are_one_base_until_something_is_learnt(target, draft):
    assistant = learning(draft, update_interval=10**6)
    one = storage(assistant.serving.active)
    learner = assistant.learner.student.module
    assert {p.data_ptr() for name, p in learner.named_parameters() if "lora_" not in name} == set(one.values())
    serve(target, assistant, PROMPTS[:3])
    assistant.flush()
    served = storage(assistant.serving.active)
    assert {name for name in one if one[name] != served[name]} == {
        f"{name}.weight" for name in assistant.adapter.modules
    }


def test_a_leased_copy_is_never_written(draft):
    adapter = Adapter(draft, 4)
    serving = HotSwapDraft(draft, set(), adapter)
    leased, befores = [], []
    for seed in range(4):
        leased.append(serving.lease())
        befores.append(snapshot(leased[-1]))
        serving.refresh(drawn(adapter, seed=seed))
    serving.rebase({"model.norm.weight": torch.full((32,), 2.0)})
    assert all(same(model, before) for model, before in zip(leased, befores, strict=True))
    assert len({id(model) for model in leased}) == 4
    for model in leased:
        serving.release(model)


def test_merged_weights_lie_in_one_piece_and_are_gone_with_the_last_call_that_held_them(draft):
    adapter = Adapter(draft, 4)
    serving = HotSwapDraft(draft, set(), adapter)
    serving.refresh(drawn(adapter, seed=1))
    merged = [serving.active.get_parameter(f"{module}.weight") for module in adapter.modules]
    pieces = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in merged}
    assert list(pieces.values()) == [sum(p.numel() * p.element_size() for p in merged)]
    spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()) for p in merged)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(spans))
    del merged
    leased, free = serving.lease(), weakref.ref(serving.active)
    serving.refresh(drawn(adapter, seed=2))
    serving.release(leased)
    assert free() is leased
    del leased
    gc.collect()
    assert free() is None


def test_a_draft_of_two_dtypes_has_a_piece_of_each(draft):
    draft = copy.deepcopy(draft)
    draft.model.layers[0].to(torch.bfloat16)
    adapter = Adapter(draft, 4)
    serving = HotSwapDraft(draft, set(), adapter)
    serving.refresh(drawn(adapter, seed=1))
    for name, tensor in adapter.merged(drawn(adapter, seed=1)):
        served = serving.active.get_parameter(name)
        assert served.dtype == draft.get_parameter(name).dtype
        assert torch.equal(served, tensor)
        assert not torch.equal(served, draft.get_parameter(name))


# What is refused.


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


# By the memory there is.


def warnings_of(caplog):
    return [
        record
        for record in caplog.records
        if record.levelno >= logging.WARNING and record.name == "hf_osd.remote.teachable"
    ]


def test_the_rank_comes_down_to_what_fits(target, draft):
    asked = learning(draft, lora=8)
    assert asked.adapter.rank == 8
    small = learning(draft, lora=8, memory_budget=memory.learning_bytes(_facts(draft), 2))
    assert small.adapter.rank == 2
    assert "rank 2" in small.learning_choice
    assert "rank 8" in small.learning_choice
    serve(target, small, PROMPTS[:3])
    assert small.stats.updates == 1


def _facts(draft):
    from hf_osd import OnlineConfig

    trainable = {name for name, p in draft.named_parameters() if p.requires_grad} - embedding_names(draft)
    return memory.LearningFacts.of(draft, trainable, adaptable(draft, trainable), OnlineConfig(**LORA))


@pytest.mark.parametrize("adapter", ["auto", "lora", "off"])
def test_what_does_not_fit_is_off_with_one_line_and_the_draft_serves_whole(target, draft, adapter, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        assistant = learning(draft, adapter=adapter, memory_budget=1000)
    [line] = warnings_of(caplog)
    assert line.getMessage() == assistant.learning_choice
    assert "Raise memory_budget" in assistant.learning_choice
    assert assistant.learner is None
    assert same(assistant.serving.active, snapshot(draft))
    for a, p in zip(serve(target, assistant, PROMPTS[:4]), PROMPTS, strict=False):
        assert torch.equal(a, target.generate(p, **GREEDY))
    assert not assistant.flush()
    assert assistant.stats.total.tested > 0


def test_a_small_draft_learns_with_all_weights_by_itself(draft):
    assistant = OnlineAssistant(draft)
    assert assistant.adapter is None
    assert "All weights learn" in assistant.learning_choice
    assert "lora" not in str(assistant.serving.trainable)


def test_a_draft_too_large_for_what_is_free_learns_in_an_adapter_by_itself(target, draft, monkeypatch):
    needed = memory.learning_bytes(_facts(draft))
    monkeypatch.setattr("hf_osd.learning.memory.available", lambda device: 4 * needed)
    assistant = OnlineAssistant(draft, seed=0)
    assert assistant.adapter.rank == 16
    assert all("lora_" in name for name in assistant.serving.trainable)


def test_learning_off_is_no_choice(draft):
    assert OnlineAssistant(draft, learn=False).learning_choice == "Nothing learns, as asked."
    assert OnlineAssistant().learning_choice == "Nothing learns: there is no draft."


def test_an_adapter_of_the_drafts_own_stays_what_learns(target):
    from peft import LoraConfig, get_peft_model

    own = get_peft_model(grow_draft(target), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assistant = learning(own)
    assert assistant.adapter is None
    assert "came with" in assistant.learning_choice
    assert all(name.startswith("base_model.") for name in assistant.serving.trainable)


# Weights from elsewhere.


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
