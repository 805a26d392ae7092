"""How an assistant's draft comes and goes: plain checkpoints and the Hub."""

import errno

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.model_card import model_card

from .served import GREEDY, PROMPTS, serve


def test_a_saved_draft_is_a_plain_checkpoint(target, draft, tmp_path):
    assistant = OnlineAssistant(draft, update_interval=2, num_assistant_tokens=3)
    serve(target, assistant, PROMPTS[:5])
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


def test_the_model_card_names_no_local_path(target, draft):
    card = model_card(OnlineAssistant(draft).stats, target="/some/where")
    assert "/some/where" not in card
