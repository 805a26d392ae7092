"""The recipes are not installed: their tests import them from the root of the repository, as `python -m recipes.…` does."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

WORDS = [f"w{i}" for i in range(62)]


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Draws nothing, except in tests that are marked `pictures`."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("recipes.common.report.RunReport._plot", lambda self, path: path.write_bytes(b""))


@pytest.fixture(autouse=True)
def quick_disks(monkeypatch):
    """Waits for no disk: nobody pulls a plug here. What happens then, tests/saving and tests/system ask."""
    monkeypatch.setattr("hf_osd.system.files._sync", lambda path: None)


@pytest.fixture
def refused(caplog) -> Callable:
    """`refused(main, *args, says=words, **kwargs)`: `main(*args, **kwargs)` ends with status 2, and `words` are in what it logs."""

    def check(main, *args, says: str, **kwargs):
        caplog.clear()
        assert main(*args, **kwargs) == 2
        assert says in caplog.text

    return check


@pytest.fixture(scope="session")
def words() -> list[str]:
    """The vocabulary of `target_dir`'s tokenizer, a token a word."""
    return WORDS


@pytest.fixture(scope="session")
def target_dir(tiny_llama, tmp_path_factory) -> Path:
    """A tiny target as a checkpoint, with a tokenizer of words and without a chat template."""
    folder = tmp_path_factory.mktemp("target")
    tiny_llama(layers=3).save_pretrained(folder)
    tokenizer_of(["<s>", "</s>", *WORDS]).save_pretrained(folder)
    return folder


def tokenizer_of(vocabulary):
    """A token a word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="w0")


@pytest.fixture
def brought_draft(tiny_llama, tmp_path) -> Callable:
    """`brought_draft(kind) -> folder`: a draft that was trained elsewhere: with a `"padded head"`, or `"another tokenizer"` that lacks words."""

    def make(kind: str, rows: int | None = None, tokenizer: bool = True) -> Path:
        folder = tmp_path / "brought"
        vocabulary = ["<s>", "</s>", *WORDS]
        if kind == "another tokenizer":
            vocabulary = [*reversed(WORDS[:50]), "</s>"]
        tiny_llama(layers=1, vocab=rows or {"padded head": 72}.get(kind, len(vocabulary))).save_pretrained(folder)
        if tokenizer:
            tokenizer_of(vocabulary).save_pretrained(folder)
        return folder

    return make
