"""How an assistant's draft comes and goes: plain checkpoints and the Hub."""

import errno

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.saving.model_card import model_card

from ..served import GREEDY, PROMPTS, serve


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


@pytest.fixture
def lora(target, draft):
    """An assistant that has learnt in an adapter of hf_osd's own."""
    assistant = OnlineAssistant(draft, adapter="lora", lora=4, update_interval=10**6, gate=False, seed=0)
    serve(target, assistant, PROMPTS[:6])
    assert assistant.flush()
    return assistant


def logits(model):
    with torch.no_grad():
        return model(input_ids=PROMPTS[0]).logits


@pytest.mark.parametrize("merge", [None, True])
def test_what_was_learnt_in_an_adapter_is_saved_as_a_plain_checkpoint(draft, lora, tmp_path, merge):
    lora.save_pretrained(tmp_path, merge=merge)
    assert not list(tmp_path.glob("adapter*"))
    card = (tmp_path / "README.md").read_text()
    assert "a plain transformers checkpoint" in card
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(plain), logits(lora.serving.active))
    assert not torch.equal(logits(plain), logits(draft))
    again = OnlineAssistant.from_pretrained(tmp_path)
    assert again.osd_config == lora.osd_config
    assert again.adapter.rank == 4
    assert torch.equal(logits(again.serving.active), logits(plain))


def test_asked_not_to_merge_it_is_saved_as_an_adapter_that_goes_on_learning(target, lora, tmp_path):
    lora.save_pretrained(tmp_path, merge=False)
    assert {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} <= {
        p.name for p in tmp_path.iterdir()
    }
    card = (tmp_path / "README.md").read_text()
    assert "an adapter, with its base in this repository" in card
    for path in tmp_path.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    again = OnlineAssistant.from_pretrained(tmp_path)
    assert again.adapter is None, "it has come with the draft"
    torch.testing.assert_close(logits(again.serving.active), logits(lora.serving.active), atol=1e-5, rtol=1e-5)
    saved = dict(again.serving.weights())
    for name, w in lora.serving.weights():
        assert torch.equal(w, saved[name]), name
    before = logits(again.serving.active)
    serve(target, again, PROMPTS[6:])
    assert again.flush()
    assert not torch.equal(logits(again.serving.active), before)
    lora.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("adapter*")), "and the other way round nothing of it stays"


def test_a_card_that_cannot_be_made_is_a_warning_and_the_draft_is_saved(draft, tmp_path, monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no words")

    monkeypatch.setattr("hf_osd.saving.pretrained.model_card", broken)
    OnlineAssistant(draft).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
    assert "no words" in caplog.text
    assert not (tmp_path / "README.md").exists()


def test_a_card_is_written_anew_with_figures_that_came_later(draft, tmp_path):
    assistant = OnlineAssistant(draft)
    assistant.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assistant.write_card(tmp_path, {"domains": {"sql": {"requests": 7, "alpha_before": 0.25}}})
    assert "| sql | 7 | 0.250 |" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == weights
