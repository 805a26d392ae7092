"""Writes the Hub's form of a generation strategy: the folder `custom_generate/` of a repository, whose code transformers runs in place of `generate`.

`hf_osd/generation/custom_generate.py` is copied there as `generate.py`. It is not imported here: transformers copies and loads it.
"""

from __future__ import annotations

import os
from pathlib import Path


def write_custom_generate(directory: str | os.PathLike) -> None:
    """Write `custom_generate/` into `directory`. That folder, or a repository with it, can then be passed to `generate` as `custom_generate="…"`.

    Raises:
        OSError: if it cannot be written.
    """
    from hf_osd import __version__
    from hf_osd.system.files import staged

    with staged(Path(directory) / "custom_generate") as staging:
        code = (Path(__file__).parents[1] / "generation" / "custom_generate.py").read_text(encoding="utf-8")
        (staging / "generate.py").write_text(code, encoding="utf-8")
        (staging / "requirements.txt").write_text(f"hf-osd>={__version__}\n", encoding="utf-8")
