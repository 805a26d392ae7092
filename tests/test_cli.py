"""The console entry: what it prints, what it writes, and one line for what is wrong."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_osd import OnlineAssistant, load_feature_draft
from hf_osd.cli import main
from hf_osd.saving.drafts import load_draft
from hf_osd.saving.feature_drafts import layout_of


def test_check_says_that_this_transformers_will_do(capsys):
    assert main(["check"]) == 0
    assert "can work with these" in capsys.readouterr().out


def test_grow_writes_a_plain_checkpoint(tiny_llama, tmp_path, capsys):
    tiny_llama(layers=3).save_pretrained(tmp_path / "target")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.save_pretrained(tmp_path / "target")
    assert main(["grow", str(tmp_path / "target"), str(tmp_path / "draft"), "--layers", "0,2"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "draft").config.num_hidden_layers == 2
    assert "parameters" in capsys.readouterr().out


FEATURE = ["--kind", "feature"]


@pytest.mark.parametrize(
    ("flags", "read"), [([], [1, 2, 3]), (FEATURE, [1, 2, 3]), ([*FEATURE, "--layers", "0,2"], [0, 2])]
)
def test_grow_makes_a_draft_that_reads_the_targets_states(model_dir, tmp_path, capsys, flags, read):
    assert main(["grow", str(model_dir), str(tmp_path / "draft"), *flags]) == 0
    draft = load_draft(tmp_path / "draft")
    assert draft.config.model_type == "osd_feature_draft"
    assert draft.config.aux_layers == read
    assert (tmp_path / "draft" / "tokenizer.json").exists()
    assert "parameters" in capsys.readouterr().out
    assert main(["grow", str(model_dir), str(tmp_path / "other"), "--kind", "feature", "--layers", "0,9"]) == 2
    assert "different whole numbers from 0 to 3" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_grow_writes_what_serving_engines_read(model_dir, tiny_llama, tmp_path, capsys, layout):
    grow = ["grow", str(model_dir), str(tmp_path / "draft"), "--layers", "1,2", "--layout", layout]
    assert main(grow) == 2
    assert "Leave `layout` out" in capsys.readouterr().err
    assert main([*grow, "--kind", "feature"]) == 0
    assert layout_of(tmp_path / "draft") == layout
    assert load_feature_draft(tmp_path / "draft", tiny_llama(layers=3)).config.aux_layers == [1, 2]


@pytest.mark.parametrize(("layers", "message"), [("0,x", "0,x"), ("0,9", "layers")])
def test_what_is_wrong_is_one_line_and_status_2(tiny_llama, tmp_path, capsys, layers, message):
    tiny_llama(layers=3).save_pretrained(tmp_path / "target")
    assert main(["grow", str(tmp_path / "target"), str(tmp_path / "draft"), "--layers", layers]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-osd: ")
    assert message in error
    assert not (tmp_path / "draft").exists()


@pytest.fixture
def model_dir(tiny_llama, tmp_path):
    folder = tmp_path / "target"
    tiny_llama(layers=3).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    tokenizer.save_pretrained(folder)
    return folder


def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("output", ["target", "target/.", "link", "target/draft", ".", "./sub/../target"])
def test_a_draft_is_not_grown_over_into_or_around_its_target(model_dir, monkeypatch, capsys, output):
    monkeypatch.chdir(model_dir.parent)
    (model_dir.parent / "link").symlink_to(model_dir)
    (model_dir.parent / "sub").mkdir()
    before = bytes_of(model_dir.parent)
    assert main(["grow", str(model_dir), output]) == 2
    assert "choose another place for the output" in capsys.readouterr().err
    assert bytes_of(model_dir.parent) == before


def test_nor_over_the_base_of_an_adapter(model_dir, capsys):
    """Asked to replace what is there, too."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    get_peft_model(model, lora).save_pretrained(model_dir.parent / "adapter")
    before = bytes_of(model_dir)
    assert main(["grow", str(model_dir.parent / "adapter"), str(model_dir), "--overwrite"]) == 2
    assert bytes_of(model_dir) == before
    assert "the target's base" in capsys.readouterr().err


def test_a_checkpoint_is_replaced_when_that_is_asked_for_and_whole(model_dir, tmp_path, capsys):
    draft = tmp_path / "draft"
    draft.mkdir()
    for name in ("config.json", "model.safetensors.index.json", "notes.txt"):
        (draft / name).write_text("{}")
    before = bytes_of(draft)
    assert main(["grow", str(model_dir), str(draft)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert bytes_of(draft) == before
    assert main(["grow", str(model_dir), str(draft), "--overwrite", "--kind", "layers"]) == 0
    assert AutoModelForCausalLM.from_pretrained(draft).config.num_hidden_layers == 2
    assert (draft / "notes.txt").read_text() == "{}"
    assert not (draft / "model.safetensors.index.json").exists(), "it would be read with the new weights"


def test_an_output_that_is_a_file_is_named_before_the_target_is_loaded(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert main(["grow", "no/such/target", str(tmp_path / "file")]) == 2
    assert "is a file; give the path of a folder" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def choose(folder, output, *flags):
    return main(["grow", str(folder), str(output), "--choose", "--max_new_tokens", "24", "--minutes", "0.01", *flags])


def test_grow_chooses_a_shape_and_writes_it_distilled(model_dir, tiny_llama, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{text}"}}\n' for text in ("a", "a a", "a a a")))
    assert choose(model_dir, tmp_path / "draft", "--json", str(tmp_path / "table.json")) == 0
    assert "texts of the target" in (shown := capsys.readouterr().out)
    assert "| shape |" in shown
    table = json.loads((tmp_path / "table.json").read_text())
    assert {row["kind"] for row in table["rows"]} == {"layers", "feature"}
    assert all(row["learnt"] for row in table["rows"])
    target = tiny_llama(layers=3)
    assistant = OnlineAssistant.from_pretrained(tmp_path / "draft", target=target)
    assert assistant.osd_config.seed == 0
    text = torch.tensor([[2, 3, 4]])
    kwargs = {"input_ids": text, "attention_mask": torch.ones_like(text), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(target.generate(**kwargs, assistant_model=assistant), target.generate(**kwargs))
    card = (tmp_path / "draft" / "README.md").read_text()
    assert "grow --choose" in card
    assert table["rows"][0]["shape"] in card
    assert str(tmp_path) not in card
    assert (tmp_path / "draft" / "tokenizer.json").exists()
    assert choose(model_dir, tmp_path / "draft", "--prompts", str(prompts)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert choose(model_dir, tmp_path / "draft", "--prompts", str(prompts), "--overwrite") == 0
    assert "answers of the target" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kind", "feature"], "leave out --kind"),
        (["--layers", "0", "--layout", "eagle3"], "leave out --layers, --layout"),
        (["--minutes", "0"], "--minutes"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--json", "target/config.json"], "choose another place"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_at_once(model_dir, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(model_dir.parent)
    before = bytes_of(model_dir.parent)
    assert choose("target", "draft", *flags) == 2
    assert message in capsys.readouterr().err
    assert bytes_of(model_dir.parent) == before
