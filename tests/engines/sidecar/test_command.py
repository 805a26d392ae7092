"""`hf-osd sidecar`: what it joins, what it goes on from, and one line for what is wrong."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_osd import OnlineConfig, grow_feature_draft, save_feature_draft
from hf_osd.cli import main
from hf_osd.engines.pusher import saved_drafts
from hf_osd.engines.sidecar import command
from hf_osd.engines.sidecar.command import SidecarArguments, make_sidecar, newest
from hf_osd.saving.drafts import load_draft

from .conftest import FakePusher, FakeServer


@pytest.fixture
def folders(target, draft, tmp_path, monkeypatch):
    """Flags that name a target and a draft; engines and pusher are fakes."""
    target.save_pretrained(tmp_path / "target")
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "target")
    draft.save_pretrained(tmp_path / "draft")
    pushers = SimpleNamespace(DraftPusher=lambda servers, folder, **_: FakePusher(folder), saved_drafts=saved_drafts)
    monkeypatch.setitem(sys.modules, "hf_osd.engines.servers", SimpleNamespace(connect=FakeServer))
    monkeypatch.setitem(sys.modules, "hf_osd.engines.pusher", pushers)
    return {
        "engine": "http://a:8000/, http://b:8000,http://a:8000",
        "target": str(tmp_path / "target"),
        "draft": str(tmp_path / "draft"),
        "folder": str(tmp_path / "pushed"),
    }


def test_it_joins_engines_assistant_and_pusher(folders):
    sidecar = make_sidecar(SidecarArguments(**folders), OnlineConfig(suffix_cache=False))
    assert [server.url for server in sidecar.servers] == ["http://a:8000", "http://b:8000"]
    sidecar._offer()
    assert not sidecar.pusher.saved, "the engines serve this draft already"
    assert sidecar.pusher.on_taken_back == sidecar.taken_back
    sidecar.close()
    assert sidecar.pusher.closed


def test_started_again_it_goes_on_from_the_newest_weights(folders, tmp_path):
    learnt = load_draft(folders["draft"])
    with torch.no_grad():
        learnt.model.layers[0].mlp.up_proj.weight.mul_(2)
    pushed = tmp_path / "pushed"
    load_draft(folders["draft"]).save_pretrained(pushed / "draft-9")
    learnt.save_pretrained(pushed / "draft-10")
    (pushed / "draft-11").mkdir()  # half written
    (pushed / "draft-x").mkdir()
    assert newest(pushed).name == "draft-10"
    sidecar = make_sidecar(SidecarArguments(**folders), OnlineConfig(suffix_cache=False))
    weights = dict(sidecar.assistant.serving.weights())
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], learnt.model.layers[0].mlp.up_proj.weight)
    sidecar.pusher.folder = tmp_path / "again"
    sidecar._offer()
    assert len(sidecar.pusher.saved) == 1, "engines may have been started with the draft of before"
    sidecar.close()


def test_without_weights_it_begins_with_the_draft(tmp_path):
    assert newest(tmp_path / "none") is None


def test_another_vocabulary_is_refused(folders, tiny_llama, tmp_path):
    tiny_llama(vocab=80).save_pretrained(tmp_path / "draft")
    with pytest.raises(ValueError, match="80 tokens, the target one of 64"):
        make_sidecar(SidecarArguments(**folders), OnlineConfig())


def test_a_draft_that_reads_states_takes_a_copy_of_the_target(folders, target):
    """And is pushed as it was given: in the engines' layout, with no more tokens."""
    draft = grow_feature_draft(target, [1, 2])
    save_feature_draft(draft, folders["draft"], "eagle3", draft_vocab=range(40))
    with pytest.raises(ValueError, match="--reread"):
        make_sidecar(SidecarArguments(**folders), OnlineConfig())
    sidecar = make_sidecar(SidecarArguments(**folders, reread=0.5), OnlineConfig(suffix_cache=False))
    sidecar._save(Path(folders["folder"]))
    sidecar.close()
    ours, given = (load_file(Path(folders[name]) / "model.safetensors") for name in ("folder", "draft"))
    assert ours.keys() == given.keys()
    assert all(torch.equal(ours[name], given[name]) for name in given)
    save_feature_draft(draft, folders["draft"], "osd")
    with pytest.raises(ValueError, match="layout='eagle3'"):
        make_sidecar(SidecarArguments(**folders, reread=0.5), OnlineConfig())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"engine": " , "}, "`engine` is empty"),
        ({"target": ""}, "`target` is empty"),
        ({"draft": ""}, "`draft` is empty"),
        ({"listen": "8100"}, "host:port"),
        ({"share": 0.0}, "share"),
        ({"reread": 1.5}, "reread"),
        ({"top_log_probs": 0}, "top_log_probs"),
    ],
)
def test_what_is_wrong_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        SidecarArguments(**{"engine": "http://a", "target": "x", "draft": "y", **wrong})


def test_weights_are_not_written_over_what_is_read(folders):
    with pytest.raises(ValueError, match="--draft"):
        SidecarArguments(**{**folders, "folder": folders["draft"]})


@pytest.mark.parametrize(("listen", "address"), [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:8100", ("::1", 8100))])
def test_an_address_is_read(listen, address):
    assert SidecarArguments(engine="http://a", target="x", draft="y", listen=listen).address == address


def test_an_error_is_one_line_and_status_2(capsys):
    assert main(["sidecar", "--target", "x"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("hf-osd: `engine` is empty")


def test_missing_packages_are_named_with_the_extra(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    assert main(["sidecar", "--engine", "http://a"]) == 2
    assert "needs uvicorn: pip install 'hf-osd[sidecar]'" in capsys.readouterr().err
