"""The blocks of docs/hub.md are run, in order, against a Hub on this machine."""

import re
from pathlib import Path

import torch

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.generation import patch as seam

PAGE = Path(__file__).parents[2] / "docs" / "hub.md"


def test_code_on_the_page_about_the_hub_runs(hub, tiny_llama, tmp_path, monkeypatch):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    monkeypatch.chdir(tmp_path)
    target = tiny_llama(layers=3)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    prompts = torch.randint(2, 64, (6, 1, 5), generator=torch.Generator().manual_seed(0))
    names = {
        "target": target,
        "draft": grow_draft(target),
        "requests": [{"input_ids": prompt, "attention_mask": torch.ones_like(prompt)} for prompt in prompts],
        "folder": "saved",
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words),
    }
    hub.make("org/target", private=False, files={"README.md": b"---\nlicense: mit\n---\n"})
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert not seam.is_enabled()
    assert hub.private["me/my-draft"]
    assert {"adapter_config.json", "model.safetensors"} <= set(hub.files("me/my-lora-draft")), "its base was grown"
    assert any(b"license: mit" in commit["tree"].get("README.md", (b"",))[0] for commit in hub.commits["me/my-draft"])
    assert isinstance(names["first"], OnlineAssistant)
