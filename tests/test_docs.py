"""Every Python block of README and docs is run, a page at a time, on a tiny random model."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import hf_osd
from hf_osd import grow_draft
from hf_osd.config import DraftingConfig, FeedbackConfig, LearningConfig, RunningConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HUB = ROOT / "docs" / "hub.md"  # run by tests/hub, where there is one


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p) and p != HUB], ids=lambda p: p.name)
def test_code_on_the_page_runs(page, tiny_llama, tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _log_a_run(tmp_path / "runs/distill")
    for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):  # one folder a process, as tests/metrics has it
        monkeypatch.setattr(f"evaluate.config.{name}", str(tmp_path_factory.getbasetemp() / name))
    target = tiny_llama(layers=3)
    prompts = torch.randint(2, 64, (6, 1, 5), generator=torch.Generator().manual_seed(0))
    requests = [{"input_ids": prompt, "attention_mask": torch.ones_like(prompt)} for prompt in prompts]
    names = {
        "target": target,
        "draft": grow_draft(target),
        "requests": requests,
        "inputs": requests[0],
        "folder": "saved",
        "tokenizer": _tokenizer(),
    }
    try:
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), names)
    finally:
        hf_osd.disable()


def _log_a_run(folder: Path):
    """What docs/metrics.md reads of a run of recipes/distill.py."""
    folder.mkdir(parents=True)
    rows = [{"accepted": 30 + i, "tested": 48, "new_tokens": 64, "rounds": 34 - i} for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    )


def test_all_options_are_on_the_page_as_the_config_has_them():
    """`python tests/test_docs.py` prints that part of the page."""
    page = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
    assert options() == page.split("## All options\n\n", 1)[1].split("\n## ", 1)[0]


def options() -> str:
    """A table for each part of `OnlineConfig`: name, default, and what its help says."""
    lines = ["Given to `OnlineConfig(...)`, as flags of the recipes and in their YAML.\n"]
    for part in (DraftingConfig, FeedbackConfig, LearningConfig, RunningConfig):
        lines += [f"### {part.__doc__.removesuffix('.')}\n", "| field | default | |", "|---|---|---|"]
        for field in dataclasses.fields(part):
            about = field.metadata["help"]
            assert "|" not in about
            lines.append(f"| `{field.name}` | `{field.default!r}` | {about} |")
        lines.append("")
    return "\n".join(lines)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def _tests(folder: str) -> set[str]:
    files = sorted((ROOT / "tests").glob(folder))
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}


def test_limits_names_the_tests_there_are_and_all_of_the_lossless_suite():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs/limits.md").read_text(encoding="utf-8")))
    assert not named - _tests("**/test_*.py")
    assert not _tests("lossless/test_*.py") - named


def test_reliability_names_the_tests_there_are_for_two_dozen_faults():
    page = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    faults = page.split("## Faults", 1)[1]
    assert not set(re.findall(r"`(test_\w+)`", faults)) - _tests("**/test_*.py")
    assert faults.count("\n| ") - 1 >= 24


if __name__ == "__main__":
    print(options())
