"""Pushing to the Hub and loading from it: what arrives, who may see it, and that each push can be had back."""

import json
import logging

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoModelForCausalLM

from hf_osd import OnlineAssistant, OnlineConfig, grow_draft

PROMPTS = torch.randint(2, 64, (6, 1, 6), generator=torch.Generator().manual_seed(0))
DRAFT = ["README.md", "config.json", "generation_config.json", "model.safetensors", "osd_config.json"]


def make(target, **config):
    config = {"gate": False, "learning_rate": 1e-3, "learning_budget": 1.0} | config
    return OnlineAssistant(grow_draft(target), update_interval=10**6, seed=0, **config)


def serve_and_learn(target, assistant):
    for prompt in PROMPTS:
        target.generate(prompt, assistant_model=assistant, max_new_tokens=12, do_sample=False)
    assistant.flush()


def weights(assistant):
    return {name: p.clone() for name, p in assistant.serving.active.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_push_is_private_and_comes_back_as_it_was(hub, target):
    assistant = make(target, num_assistant_tokens=3)
    serve_and_learn(target, assistant)
    address = assistant.push_to_hub("me/draft")
    assert hub.private == {"me/draft": True}
    assert sorted(hub.files("me/draft")) == DRAFT
    assert address == f"{hub.endpoint}/me/draft/commit/{hub.commits['me/draft'][-1]['sha']}"
    again = OnlineAssistant.from_pretrained("me/draft")
    assert same(weights(again), weights(assistant))
    assert again.osd_config == assistant.osd_config


def test_anyone_can_load_it_without_hf_osd(hub, target):
    assistant = make(target)
    assistant.push_to_hub("me/draft")
    plain = AutoModelForCausalLM.from_pretrained("me/draft")
    assert same(dict(plain.named_parameters()), weights(assistant))


def test_each_push_is_a_commit_that_can_be_had_back(hub, target):
    assistant, pushed = make(target), []
    for _ in range(3):
        address = assistant.push_to_hub("me/draft")
        pushed.append((address.rpartition("/")[2], weights(assistant)))
        serve_and_learn(target, assistant)
    assert hub.history("me/draft")[1:] == [
        f"Draft after {updates} updates on {requests} requests" for updates, requests in ((0, 0), (1, 6), (2, 12))
    ]
    assert not same(pushed[0][1], pushed[1][1])
    for revision, as_pushed in pushed:
        assert same(weights(OnlineAssistant.from_pretrained("me/draft", revision=revision)), as_pushed)


def test_a_message_of_ones_own_is_the_commits(hub, target):
    make(target).push_to_hub("me/draft", commit_message="after the holidays")
    assert hub.history("me/draft")[-1] == "after the holidays"


def test_the_config_of_that_revision_comes_with_it(hub, target):
    first = make(target, num_assistant_tokens=2).push_to_hub("me/draft").rpartition("/")[2]
    make(target, num_assistant_tokens=4).push_to_hub("me/draft")
    assert OnlineAssistant.from_pretrained("me/draft", revision=first).osd_config.num_assistant_tokens == 2
    assert OnlineAssistant.from_pretrained("me/draft").osd_config.num_assistant_tokens == 4


def test_a_draft_that_hf_osd_did_not_save_has_the_default_config(hub, target, tmp_path):
    grow_draft(target).save_pretrained(tmp_path)
    hub.make("you/plain", private=False, files={path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert OnlineAssistant.from_pretrained("you/plain").osd_config == OnlineConfig()


def test_what_was_loaded_once_is_loaded_offline(hub, target, monkeypatch, tmp_path):
    assistant = make(target)
    assistant.push_to_hub("me/draft")
    OnlineAssistant.from_pretrained("me/draft")
    grow_draft(target).save_pretrained(tmp_path / "plain")
    hub.make("you/plain", private=False, files={p.name: p.read_bytes() for p in (tmp_path / "plain").iterdir()})
    AutoModelForCausalLM.from_pretrained("you/plain")
    hub.fail("GET", "", *["cut"] * 100)
    hub.fail("HEAD", "", *["cut"] * 100)
    for again in (
        OnlineAssistant.from_pretrained("me/draft", local_files_only=True),
        OnlineAssistant.from_pretrained("you/plain", local_files_only=True),
    ):
        assert same(weights(again), weights(assistant))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert OnlineAssistant.from_pretrained("me/draft").osd_config == assistant.osd_config
    assert OnlineAssistant.from_pretrained("you/plain").osd_config == OnlineConfig()


@pytest.mark.parametrize(("private", "words"), [(True, "is private"), (False, "FOR ALL TO READ")])
def test_each_push_warns_once_that_weights_memorise(hub, target, caplog, private, words):
    assistant = make(target)
    for pushes in (1, 2):
        assistant.push_to_hub("me/draft", private=private)
        said = [
            r.getMessage()
            for r in caplog.records
            if r.name == "hf_osd.saving.pretrained" and "memorised" in r.getMessage()
        ]
        assert len(said) == pushes
        assert words in said[-1]
    assert hub.private == {"me/draft": private}


def test_a_public_repository_is_not_pushed_to_by_mistake(hub, target):
    hub.make("me/draft", private=False)
    with pytest.raises(ValueError, match=r"me/draft exists and is public.*private=False"):
        make(target).push_to_hub("me/draft")
    assert hub.files("me/draft") == {}
    make(target).push_to_hub("me/draft", private=False)
    assert sorted(hub.files("me/draft")) == DRAFT


def test_without_a_draft_no_repository_is_made(hub):
    with pytest.raises(ValueError, match="no draft"):
        OnlineAssistant().push_to_hub("me/draft")
    assert hub.commits == {}


def test_what_others_put_into_the_repository_stays_and_what_is_no_longer_of_the_draft_goes(hub, target):
    kept = {"notes.md": b"mine", "onnx/model.safetensors": b"mine"}
    old = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "adapter_config.json": b"{}",
    }
    hub.make("me/draft", files=kept | old)
    make(target).push_to_hub("me/draft")
    assert sorted(hub.files("me/draft")) == sorted([*DRAFT, *kept])


def test_the_hub_reads_the_cards_metadata(hub, target):
    hub.make("org/target", private=False, files={"README.md": b"---\nlicense: apache-2.0\n---\n"})
    domains = {"sql": {"requests": 40, "held_back": 16, "alpha_before": 0.25, "alpha_after": 0.5}}
    make(target).push_to_hub("me/draft", card={"target": "org/target", "domains": domains})
    data = HfApi().model_info("me/draft").card_data
    assert (data.base_model, data.license, data.model_name) == ("org/target", "apache-2.0", "draft")
    found = {(r.dataset_name, r.metric_type): (r.metric_value, r.metric_args) for r in data.eval_results}
    assert found == {
        ("sql", "alpha_before"): (0.25, {"requests": 40, "held_back": 16}),
        ("sql", "alpha_after"): (0.5, {"requests": 40, "held_back": 16}),
    }
    assert ModelCard.load("me/draft").data.to_dict() == data.to_dict()


def test_a_targets_own_licence_is_inherited_with_name_and_link(hub, target):
    licence = {"license": "other", "license_name": "theirs", "license_link": "https://example.com/licence"}
    head = "\n".join(f"{key}: {value}" for key, value in licence.items())
    hub.make("org/target", private=False, files={"README.md": f"---\n{head}\n---\n".encode()})
    make(target).push_to_hub("me/draft", card={"target": "org/target"})
    data = HfApi().model_info("me/draft").card_data
    assert {key: data[key] for key in licence} == licence


def test_a_licence_that_is_said_is_not_asked_for(hub, target):
    make(target).push_to_hub("me/draft", card={"target": "org/target", "license": "mit"})
    assert hub.count("GET", "org/target") == 0
    assert HfApi().model_info("me/draft").card_data.license == "mit"


def test_a_target_that_cannot_be_asked_costs_the_licence_alone(hub, target):
    make(target).push_to_hub("me/draft", card={"target": "org/hidden"})
    assert HfApi().model_info("me/draft").card_data.license is None


def test_no_prompt_no_path_and_no_token_is_pushed_or_logged(hub, target, tmp_path, caplog, monkeypatch):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    caplog.set_level(logging.DEBUG)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    assistant = make(target)
    serve_and_learn(target, assistant)
    assistant.save_pretrained(tmp_path / "here", tokenizer)
    assistant = OnlineAssistant.from_pretrained(tmp_path / "here", OnlineConfig(update_interval=10**6))
    serve_and_learn(target, assistant)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "here")
    assistant.push_to_hub("me/draft", processing_class=tokenizer, card={"target": str(tmp_path), "domains": {}})
    text = b"".join(contents for path, contents in hub.files("me/draft").items() if not path.endswith(".safetensors"))
    token = hub.headers_of("POST", "create")[0]["authorization"].removeprefix("Bearer ").encode()
    for secret in (str(tmp_path).encode(), token):
        assert secret not in text
    for prompt in PROMPTS[:, 0].tolist():
        for written in (json.dumps(prompt), " ".join(f"w{i}" for i in prompt)):
            assert written.encode() not in text
    assert token.decode() not in caplog.text
