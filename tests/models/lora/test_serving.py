"""Drafts that learn in a LoRA adapter of hf_osd's own, over weights that stay, which the serving copies have in theirs."""

import copy
import gc
import itertools
import weakref

import pytest
import torch

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.models.copies import embedding_names
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.models.lora import Adapter, adaptable
from hf_osd.models.plain import merged as merged_by_peft

from ...served import GREEDY, PROMPTS, logits, serve
from .adapters import drawn, flushed, gpt2, learning, mixtral, same, snapshot, storage, t5

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
