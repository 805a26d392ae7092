"""How an assistant's draft and its learner come and go: plain checkpoints, the Hub, the state of a restart; and what goes to disk."""

import errno
import json
import os
import stat

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_osd import OnlineAssistant, OnlineConfig, grow_draft
from hf_osd.model_card import model_card

PROMPTS = torch.randint(2, 64, (12, 1, 6), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=3)


@pytest.fixture(scope="module")
def draft(target):
    return grow_draft(target, (0, -1))


def serve(target, assistant, count=12):
    return [target.generate(p, assistant_model=assistant, **GREEDY) for p in PROMPTS[:count]]


def test_a_saved_draft_is_a_plain_checkpoint(target, draft, tmp_path):
    assistant = OnlineAssistant(draft, update_interval=2, num_assistant_tokens=3)
    serve(target, assistant, 5)
    assistant.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    stock = target.generate(PROMPTS[0], assistant_model=plain, **GREEDY)
    assert torch.equal(stock, target.generate(PROMPTS[0], **GREEDY))
    again = OnlineAssistant.from_pretrained(tmp_path)
    assert again.osd_config == assistant.osd_config
    for (name, a), (_, b) in zip(assistant.serving.weights(), again.serving.weights(), strict=True):
        assert torch.equal(a, b), name
    card = (tmp_path / "README.md").read_text()
    assert "speculative-decoding" in card
    assert str(assistant.stats.total.requests) in card


def test_a_full_disk_leaves_the_old_checkpoint(target, draft, tmp_path, monkeypatch):
    assistant = OnlineAssistant(draft)
    assistant.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OnlineConfig, "save_pretrained", full)
    with pytest.raises(OSError, match=r"Cannot save to .*No space left.*unchanged"):
        assistant.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_unreadable_draft_is_named(draft, tmp_path):
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        OnlineAssistant.from_pretrained(tmp_path)
    OnlineAssistant(draft).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=f"{tmp_path} are damaged"):
        OnlineAssistant.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    (tmp_path / "osd_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        OnlineAssistant.from_pretrained(tmp_path)


def test_a_resumed_learner_goes_on_as_if_it_had_not_stopped(target, draft, tmp_path):
    def fresh():
        return OnlineAssistant(draft, update_interval=10**6, seed=3, replay=0.0, draft_cost=0.2)

    straight, stopped = fresh(), fresh()
    for assistant in (straight, stopped):
        serve(target, assistant, 4)
        assistant.flush()
    stopped.save_state(tmp_path)
    resumed = fresh()
    resumed.load_state(tmp_path)
    assert resumed.stats.updates == 1
    for (_, a), (_, b) in zip(stopped.serving.weights(), resumed.serving.weights(), strict=True):
        assert torch.equal(a, b)
    for assistant in (straight, resumed):
        for p in PROMPTS[4:8]:
            target.generate(p, assistant_model=assistant, **GREEDY)
        assistant.flush()
    for (name, a), (_, b) in zip(straight.serving.weights(), resumed.serving.weights(), strict=True):
        # Not exactly: the optimizer's state is float32 in both, but batches may be drawn in another order.
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_a_damaged_or_foreign_state_is_refused(target, draft, tmp_path):
    assistant = OnlineAssistant(draft)
    with pytest.raises(OSError, match="learner"):
        assistant.load_state(tmp_path)
    assistant.save_state(tmp_path)
    with pytest.raises(ValueError, match="another draft"):
        OnlineAssistant(grow_draft(target, (0,))).load_state(tmp_path)
    path = tmp_path / "learner.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        assistant.load_state(tmp_path)


def test_prompts_are_written_only_when_asked(target, draft, tmp_path):
    assistant = OnlineAssistant(draft, update_interval=2)
    serve(target, assistant, 3)
    assistant.save_pretrained(tmp_path / "draft")
    assistant.save_state(tmp_path / "state")
    assert not (tmp_path / "state" / "buffer.safetensors").exists()
    assistant.save_state(tmp_path / "asked", with_buffer=True)
    assert stat.S_IMODE(os.stat(tmp_path / "asked" / "buffer.safetensors").st_mode) == 0o600
    restored = OnlineAssistant(draft)
    restored.load_state(tmp_path / "asked")
    assert len(restored.buffer) == 3


def test_what_is_held_back_survives_a_restart_where_asked(target, draft, tmp_path):
    def fresh():
        return OnlineAssistant(draft, update_interval=10**6, held_back_share=0.25, seed=0)

    assistant = fresh()
    serve(target, assistant, 9)
    assistant.save_state(tmp_path / "state")
    assistant.save_state(tmp_path / "asked", with_buffer=True)
    [path] = (tmp_path / "asked").glob("held_back*")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert not list((tmp_path / "state").glob("held_back*"))
    restored, without = fresh(), fresh()
    restored.load_state(tmp_path / "asked")
    without.load_state(tmp_path / "state")
    assert (restored.stats.held_back, without.stats.held_back) == (2, 0)
    for was, now in zip(assistant.learner.held.requests(), restored.learner.held.requests(), strict=True):
        assert torch.equal(was.tokens, now.tokens)
        assert torch.equal(was.overlap.nan_to_num(-1), now.overlap.nan_to_num(-1))
    for other in (assistant, restored, without):
        serve(target, other, 2)  # the tenth is the next to be held back
        other.update()
        assert torch.equal(other.learner.held.requests()[-1].tokens[:6].long(), PROMPTS[0][0])
        assert other.learner.held.judged_rows == assistant.learner.held.judged_rows > 0
    assert [len(other.learner.held) for other in (assistant, restored, without)] == [3, 3, 1]


def test_pushes_privately_and_nothing_but_the_draft(target, draft, monkeypatch):
    import huggingface_hub

    pushed = {}

    class Api:
        def __init__(self, token=None):
            pushed["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            pushed["private"] = private
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id, folder_path, commit_message):
            pushed["files"] = sorted(os.listdir(folder_path))
            return f"hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assistant = OnlineAssistant(draft, update_interval=2)
    serve(target, assistant, 3)
    assert assistant.push_to_hub("me/draft", token="secret") == "hub/me/draft"
    assert pushed["private"] is True
    expected = ["README.md", "config.json", "generation_config.json", "model.safetensors", "osd_config.json"]
    assert pushed["files"] == expected


def test_the_model_card_names_no_local_path(target, draft):
    card = model_card(OnlineAssistant(draft).stats, target="/some/where")
    assert "/some/where" not in card


def test_a_state_without_prompts_takes_those_of_an_older_one_off_the_disk(target, draft, tmp_path):
    assistant = OnlineAssistant(draft, update_interval=2)
    serve(target, assistant, 3)
    assistant.save_state(tmp_path, with_buffer=True)
    assistant.save_state(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["learner.json", "learner.safetensors"]


def test_a_state_of_another_version_is_refused(target, draft, tmp_path):
    assistant = OnlineAssistant(draft, update_interval=2)
    serve(target, assistant, 3)
    assistant.save_state(tmp_path)
    path = tmp_path / "learner.json"
    values = json.loads(path.read_text())
    del values["members"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="another version"):
        assistant.load_state(tmp_path)
