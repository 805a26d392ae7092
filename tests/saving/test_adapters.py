"""Drafts with an adapter, saved and loaded: the adapter as PEFT has it, with its base where nobody else has that."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from hf_osd import OnlineAssistant, OnlineConfig, grow_draft
from hf_osd.saving.drafts import load_draft

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
IDS = torch.arange(4, 28)[None]
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
BASE = {"config.json", "generation_config.json", "model.safetensors"}
COMMIT = "0123456789" * 4
BESIDE = {"README.md", "osd_config.json"}


def wrapped(draft, **lora):
    return get_peft_model(draft, LoraConfig(task_type="CAUSAL_LM", **LORA | lora), autocast_adapter_dtype=False)


def native(draft, **lora):
    draft.add_adapter(LoraConfig(**LORA | lora), "topic")
    return draft


@pytest.fixture
def of_the_hub(target, tmp_path, monkeypatch):
    """A draft of the Hub's, as loading leaves it, and its files in the cache, as downloading does."""
    cache = tmp_path.with_name(tmp_path.name + "-cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    repository = cache / "models--org--base"
    grow_draft(target).save_pretrained(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)

    def make(dtype=torch.float32):
        return AutoModelForCausalLM.from_pretrained("org/base", dtype=dtype)

    return make


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def names(directory):
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("kind", [wrapped, native])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_is_exact_and_the_adapter_goes_on_training(target, kind, dtype, tmp_path):
    draft = kind(grow_draft(target.to(torch.float32)).to(dtype))
    assistant = OnlineAssistant(draft)
    assistant.save_pretrained(tmp_path)
    assert names(tmp_path) == ADAPTER | BASE | BESIDE
    again = OnlineAssistant.from_pretrained(tmp_path)
    a, b = (dict(one.serving.active.named_parameters()) for one in (assistant, again))
    bare = {name.removeprefix("base_model.model.").replace("topic", "default"): p for name, p in a.items()}
    assert bare.keys() == b.keys()
    for name, p in b.items():
        assert p.dtype == dtype
        assert torch.equal(p, bare[name]), name
    assert again.serving.trainable == {name for name in b if "lora_" in name}
    if dtype == torch.float32:
        assert torch.equal(logits(again.serving.active), logits(assistant.serving.active))


@pytest.mark.parametrize("kind", [wrapped, native])
def test_what_learning_made_of_it_is_what_is_saved(target, kind, tmp_path):
    assistant = OnlineAssistant(
        kind(grow_draft(target)), update_interval=10**6, gate=False, learning_rate=1e-3, seed=0
    )
    before = logits(assistant.serving.active)
    for start in range(2, 8):
        prompt = torch.arange(start, start + 6)[None]
        target.generate(prompt, assistant_model=assistant, max_new_tokens=12, do_sample=False)
    assert assistant.flush()
    assistant.save_pretrained(tmp_path)
    again = OnlineAssistant.from_pretrained(tmp_path)
    assert not torch.equal(logits(assistant.serving.active), before)
    assert torch.equal(logits(again.serving.active), logits(assistant.serving.active))
    target.generate(IDS[:, :6], assistant_model=again, max_new_tokens=12, do_sample=False)
    assert again.flush()


@pytest.mark.parametrize("merge", [False, True])
def test_what_was_loaded_is_saved_again_with_its_base(target, merge, tmp_path):
    """transformers notes the names of the adapter's file on the model: the base was once written under these, and lost."""
    draft = wrapped(grow_draft(target))
    OnlineAssistant(draft).save_pretrained(tmp_path / "first")
    OnlineAssistant.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "again", merge=merge)
    # What is merged is computed in another order.
    near = {"atol": 1e-4, "rtol": 1e-4} if merge else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(logits(load_draft(tmp_path / "again")), logits(draft), **near)


def test_transformers_alone_loads_an_adapter_with_its_base(target, tmp_path):
    draft = wrapped(grow_draft(target))
    OnlineAssistant(draft).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(draft))


def test_peft_alone_loads_the_adapter_on_its_base(target, of_the_hub, tmp_path):
    draft = wrapped(of_the_hub())
    OnlineAssistant(draft).save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(grow_draft(target), tmp_path)), logits(draft))


def test_of_a_base_of_the_hub_the_adapter_is_saved_alone_by_repository_and_commit(target, of_the_hub, tmp_path):
    OnlineAssistant(wrapped(of_the_hub())).save_pretrained(tmp_path)
    assert names(tmp_path) == ADAPTER | BESIDE
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (facts["base_model_name_or_path"], facts["revision"]) == ("org/base", COMMIT)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: peft" in card
    assert "base_model: org/base" in card


def test_a_base_that_is_not_the_hubs_any_more_goes_along(target, of_the_hub, tmp_path):
    draft = wrapped(of_the_hub())
    with torch.no_grad():
        draft.get_base_model().model.norm.weight[3] += 0.5
    OnlineAssistant(draft).save_pretrained(tmp_path)
    assert names(tmp_path) == ADAPTER | BASE | BESIDE


def test_a_base_of_the_hub_is_known_in_another_dtype(target, of_the_hub, tmp_path):
    OnlineAssistant(wrapped(of_the_hub(torch.bfloat16))).save_pretrained(tmp_path)
    assert names(tmp_path) == ADAPTER | BESIDE


def test_modules_that_train_whole_come_back(target, of_the_hub, tmp_path):
    draft = wrapped(of_the_hub(), modules_to_save=["lm_head"])
    with torch.no_grad():
        draft.get_output_embeddings().weight.add_(0.1)
    assistant = OnlineAssistant(draft, freeze_embeddings=False)
    assistant.save_pretrained(tmp_path)
    (tmp_path / "base").mkdir()
    grow_draft(target).save_pretrained(tmp_path / "base")
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    local = facts | {"base_model_name_or_path": str(tmp_path / "base"), "revision": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(local))
    again = load_draft(tmp_path)
    assert torch.equal(logits(again), logits(draft))
    trains = [name for name, p in again.named_parameters() if p.requires_grad]
    assert "lm_head.modules_to_save.default.weight" in trains
    assert len(trains) == len(assistant.serving.trainable)


def test_offline_a_draft_without_adapter_and_config_is_loaded_from_the_cache(of_the_hub):
    """Of files that were never asked for the cache cannot say whether the repository has them."""
    assistant = OnlineAssistant.from_pretrained("org/base")
    assert assistant.osd_config == OnlineConfig()
    assert torch.equal(logits(assistant.serving.active), logits(of_the_hub()))


def test_a_grown_draft_does_not_pass_for_the_target(target, tmp_path, monkeypatch):
    """It inherits the target's config, which says where the target is from."""
    monkeypatch.setattr(target.config, "_name_or_path", "org/target")
    draft = wrapped(grow_draft(target))
    OnlineAssistant(draft).save_pretrained(tmp_path)
    assert "org/target" not in (tmp_path / "adapter_config.json").read_text()
    assert names(tmp_path) >= BASE


def test_no_path_of_this_machine_is_written(target, tmp_path):
    grow_draft(target).save_pretrained(tmp_path / "base")
    draft = wrapped(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    OnlineAssistant(draft).save_pretrained(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_the_active_adapter_is_the_one_that_is_saved(target, tmp_path):
    draft = wrapped(grow_draft(target))
    draft.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", **LORA))
    draft.set_adapter("other")
    OnlineAssistant(draft).save_pretrained(tmp_path)
    assert torch.equal(logits(load_draft(tmp_path)), logits(draft))
    assert not any(path.is_dir() for path in tmp_path.iterdir())


def test_two_active_adapters_are_refused_and_nothing_is_changed(target, tmp_path):
    draft = native(grow_draft(target))
    draft.add_adapter(LoraConfig(**LORA), "other")
    draft.set_adapter(["topic", "other"])
    with pytest.raises(ValueError, match=r"'other', 'topic'.*set_adapter"):
        OnlineAssistant(draft).save_pretrained(tmp_path)
    assert names(tmp_path) == set()


def test_a_full_draft_and_an_adapter_saved_to_one_place_are_not_mixed(target, of_the_hub, tmp_path):
    full = OnlineAssistant(grow_draft(target, (1,)))
    alone, whole = OnlineAssistant(wrapped(of_the_hub())), OnlineAssistant(wrapped(grow_draft(target)))
    (tmp_path / "notes.txt").write_text("mine")
    for assistant, files in ((full, BASE), (alone, ADAPTER), (whole, ADAPTER | BASE), (full, BASE)):
        assistant.save_pretrained(tmp_path)
        assert names(tmp_path) == files | BESIDE | {"notes.txt"}


def test_weights_that_are_no_safetensors_are_not_read(target, tmp_path):
    OnlineAssistant(wrapped(grow_draft(target))).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter_model.bin")
    with pytest.raises(OSError, match="safetensors, the only form"):
        OnlineAssistant.from_pretrained(tmp_path)


def test_damaged_and_homeless_adapters_are_named(target, of_the_hub, tmp_path):
    OnlineAssistant(wrapped(of_the_hub())).save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        load_draft(tmp_path)
    OnlineAssistant(wrapped(grow_draft(target))).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=f"{tmp_path} are damaged"):
        load_draft(tmp_path)


def test_an_adapter_that_does_not_fit_its_base_is_refused(target, tmp_path):
    OnlineAssistant(wrapped(grow_draft(target))).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: w for name, w in weights.items() if "layers.0" in name}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks .*layers\.1"):
        load_draft(tmp_path)


@pytest.mark.parametrize("kind", [wrapped, native])
def test_an_adapter_that_came_with_the_draft_stays_whatever_the_config_says(target, kind, tmp_path):
    assistant = OnlineAssistant(kind(grow_draft(target)), adapter="lora", lora=2)
    assert assistant.adapter is None
    assert all(p.shape[0] == 4 for name, p in assistant.serving.weights() if "lora_A" in name), "of its own rank"
    assistant.save_pretrained(tmp_path)
    assert names(tmp_path) >= ADAPTER
    assistant.save_pretrained(tmp_path, merge=True)
    assert not names(tmp_path) & ADAPTER


ENDS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "whole head": {"modules_to_save": ["lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "both whole, as one": {"modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    "some tokens": {"trainable_token_indices": [5, 6, 7]},
}


def read_by_config(directory):
    """The logits of somebody who reads `config.json` and the file, and has no other knowledge: where the ends are tied there is no head."""
    config = AutoConfig.from_pretrained(directory)
    model, weights = AutoModelForCausalLM.from_config(config).eval(), load_file(directory / "model.safetensors")
    assert ("lm_head.weight" in weights) != config.tie_word_embeddings
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    model.load_state_dict(weights)
    return logits(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kind", "ends"), [(native, "head"), *((wrapped, ends) for ends in ENDS)])
def test_an_adapter_on_an_end_learns_and_is_saved_as_it_serves(target, tiny_llama, kind, tied, ends, tmp_path):
    draft = kind(tiny_llama(tie_word_embeddings=tied), **ENDS[ends])
    with torch.no_grad():
        for p in draft.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    before = logits(draft)
    learning = {"update_interval": 10**6, "gate": False, "learning_rate": 1e-2, "warmup_steps": 0, "seed": 0}
    assistant = OnlineAssistant(draft, freeze_embeddings=False, **learning)
    for start in range(2, 5):
        target.generate(
            torch.arange(start, start + 6)[None], assistant_model=assistant, max_new_tokens=12, do_sample=False
        )
    assert assistant.flush()
    assert assistant.stats.failed_updates == 0
    served = logits(assistant.serving.active)
    assert not torch.equal(served, before)
    near = {"atol": 1e-4, "rtol": 1e-4}
    assistant.save_pretrained(tmp_path / "apart")
    torch.testing.assert_close(logits(load_draft(tmp_path / "apart")), served, **near)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "apart")), served, **near)
    assistant.save_pretrained(tmp_path / "merged", merge=True)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), served, **near)
    torch.testing.assert_close(read_by_config(tmp_path / "merged"), served, **near)
    assert torch.equal(logits(assistant.serving.active), served), "saving changes nothing that serves"


def test_an_adapter_on_an_end_alone_asks_for_ends_that_learn(target):
    given = wrapped(grow_draft(target), target_modules=["lm_head"])
    with pytest.raises(ValueError, match="freeze_embeddings=False"):
        OnlineAssistant(given)
    assert OnlineAssistant(given, freeze_embeddings=False).serving.trainable


@pytest.mark.parametrize("tied", [False, True])
def test_ends_tied_or_parted_by_hand_are_saved_as_they_are(tiny_llama, tied, tmp_path):
    draft = tiny_llama(tie_word_embeddings=not tied)
    draft.lm_head.weight = torch.nn.Parameter(draft.model.embed_tokens.weight.detach().flip(0))
    if tied:
        draft.lm_head.weight = draft.model.embed_tokens.weight
    OnlineAssistant(draft, learn=False).save_pretrained(tmp_path / "plain")
    assert torch.equal(read_by_config(tmp_path / "plain"), logits(draft))
    assert torch.equal(logits(load_draft(tmp_path / "plain")), logits(draft))
    assert draft.config.tie_word_embeddings != tied, "the given one is left as it is"
    adapted = wrapped(draft)
    OnlineAssistant(adapted, learn=False).save_pretrained(tmp_path / "apart")
    assert torch.equal(logits(load_draft(tmp_path / "apart")), logits(adapted))


def test_what_the_config_of_an_encoder_decoder_cannot_say_is_refused(tmp_path):
    """There it also says how hidden states are scaled."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, **sizes, decoder_start_token_id=0)).eval()
    t5.add_adapter(LoraConfig(r=4, target_modules=["q", "lm_head"], init_lora_weights=False), "topic")
    assistant = OnlineAssistant(t5, learn=False)
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration are one weight.*merge=False"):
        assistant.save_pretrained(tmp_path, merge=True)
    assert names(tmp_path) == set()


def test_an_adapter_of_its_own_is_not_lost_on_the_way_to_a_process(target):
    with pytest.raises(ValueError, match=r"adapter that is not in its weights.*learn='background'"):
        OnlineAssistant(native(grow_draft(target)), learn="process")
