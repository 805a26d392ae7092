"""LoRA drafts on the Hub: pushed as adapters, had back by revision, loaded by strangers."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_osd import OnlineAssistant, grow_draft

IDS = torch.arange(4, 28)[None]


def lora(draft, seed=0):
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(draft, config)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def base_of(hub, target, tmp_path):
    grow_draft(target).save_pretrained(tmp_path / "base")
    hub.make("org/base", private=False, files={p.name: p.read_bytes() for p in (tmp_path / "base").iterdir()})
    return AutoModelForCausalLM.from_pretrained("org/base")


def test_on_a_base_of_the_hub_the_adapter_alone_is_pushed_and_comes_back(hub, target, tmp_path):
    assistant = OnlineAssistant(lora(base_of(hub, target, tmp_path)))
    assistant.push_to_hub("me/lora")
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors", "osd_config.json"]
    assert sorted(hub.files("me/lora")) == files
    again = OnlineAssistant.from_pretrained("me/lora")
    assert torch.equal(logits(again.serving.active), logits(assistant.serving.active))
    assert all("lora_" in name for name in again.serving.trainable)


def test_it_comes_back_on_the_base_it_was_learnt_on_after_that_has_changed(hub, target, tmp_path):
    assistant = OnlineAssistant(lora(base_of(hub, target, tmp_path)))
    assistant.push_to_hub("me/lora")
    grow_draft(target, (1, 2)).save_pretrained(tmp_path / "base")
    changed = {p.name: (p.read_bytes(), False) for p in (tmp_path / "base").iterdir()}
    hub.add("org/base", changed, "another model altogether")
    again = OnlineAssistant.from_pretrained("me/lora")
    assert torch.equal(logits(again.serving.active), logits(assistant.serving.active))


@pytest.mark.parametrize("base", ["grown", "of the Hub"])
def test_each_revision_comes_back_as_it_was_pushed(hub, target, tmp_path, base):
    pushed = []
    for seed in (1, 2):
        draft = grow_draft(target) if base == "grown" else base_of(hub, target, tmp_path)
        assistant = OnlineAssistant(lora(draft, seed))
        address = assistant.push_to_hub("me/lora")
        pushed.append((address.rpartition("/")[2], logits(assistant.serving.active)))
    assert not torch.equal(pushed[0][1], pushed[1][1])
    for revision, said in pushed:
        again = OnlineAssistant.from_pretrained("me/lora", revision=revision)
        assert torch.equal(logits(again.serving.active), said)


def test_a_grown_base_goes_along_once_and_strangers_load_both(hub, target):
    draft = grow_draft(target)
    for seed in (1, 2):
        assistant = OnlineAssistant(lora(draft, seed))
        draft = grow_draft(target)
        assistant.push_to_hub("me/lora")
    assert hub.count("PUT", "/storage/") == 3, "two adapters and one base"
    stranger = AutoModelForCausalLM.from_pretrained("me/lora")
    assert torch.equal(logits(stranger), logits(assistant.serving.active))
    facts = json.loads(hub.files("me/lora")["adapter_config.json"])
    assert facts["base_model_name_or_path"] == "me/lora"


def test_of_an_adapter_no_pickle_is_fetched(hub, target):
    OnlineAssistant(lora(grow_draft(target))).push_to_hub("me/lora")
    tree = hub.commits["me/lora"][-1]["tree"]
    tree["adapter_model.bin"] = tree.pop("adapter_model.safetensors")
    with pytest.raises(OSError, match="safetensors"):
        OnlineAssistant.from_pretrained("me/lora")
    assert hub.count("GET", r"\.bin$") == 0


@pytest.mark.parametrize(
    ("merge", "files"), [(None, {"model.safetensors"}), (False, {"model.safetensors", "adapter_model.safetensors"})]
)
def test_an_adapter_of_hf_osds_own_is_pushed_in_the_weights_or_as_asked(hub, target, merge, files):
    assistant = OnlineAssistant(grow_draft(target), adapter="lora", lora=2)
    assistant.push_to_hub("me/draft", merge=merge)
    assert {name for name in hub.files("me/draft") if name.endswith(".safetensors")} == files
    again = OnlineAssistant.from_pretrained("me/draft")
    assert (again.adapter is None) == (merge is False)
    assert torch.equal(logits(again.serving.active), logits(assistant.serving.active))
