"""The console entry: what it prints, what it writes, and one line for what is wrong."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_osd.cli import main


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


@pytest.mark.parametrize(("layers", "message"), [("0,x", "0,x"), ("0,9", "layers")])
def test_what_is_wrong_is_one_line_and_status_2(tiny_llama, tmp_path, capsys, layers, message):
    tiny_llama(layers=3).save_pretrained(tmp_path / "target")
    assert main(["grow", str(tmp_path / "target"), str(tmp_path / "draft"), "--layers", layers]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("hf-osd: ")
    assert message in error
    assert not (tmp_path / "draft").exists()
