"""The seam: opened once, closed without trace, invisible to every other assistant, and loud when transformers changes."""

import logging
import subprocess
import sys

import pytest
import torch
from transformers import GenerationMixin

import hf_osd
from hf_osd import OnlineAssistant
from hf_osd.generation import patch as seam

PROMPT = torch.tensor([[5, 9, 17, 3]])


@pytest.fixture(autouse=True)
def seam_closed_after():
    yield
    hf_osd.disable()


def test_opens_once_and_closes_to_what_was_there():
    def methods():
        return GenerationMixin._get_candidate_generator, GenerationMixin._assisted_decoding

    hf_osd.disable()
    original = methods()
    hf_osd.enable()
    opened = methods()
    hf_osd.enable()
    assert methods() == opened
    assert not set(opened) & set(original)
    hf_osd.disable()
    assert methods() == original
    hf_osd.disable()
    assert methods() == original


def test_stock_assistants_prompt_lookup_and_early_exit_go_through_untouched(tiny_llama, monkeypatch):
    from transformers.generation import candidate_generator

    target, draft = tiny_llama(layers=3), tiny_llama(layers=1)
    hf_osd.enable()
    seen = []
    for name in ("AssistedCandidateGenerator", "PromptLookupCandidateGenerator", "EarlyExitCandidateGenerator"):
        kind = getattr(candidate_generator, name)
        monkeypatch.setattr(kind, "__init__", _noting(kind.__init__, seen, name))
    plain = target.generate(PROMPT, max_new_tokens=12, do_sample=False)
    for kwargs in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 2}):
        assert torch.equal(plain, target.generate(PROMPT, max_new_tokens=12, do_sample=False, **kwargs))
    assert seen[:2] == ["AssistedCandidateGenerator", "PromptLookupCandidateGenerator"]
    assert "EarlyExitCandidateGenerator" in seen


def _noting(init, seen, name):
    def wrapped(self, *args, **kwargs):
        if type(self).__name__ == name:
            seen.append(name)
        init(self, *args, **kwargs)

    return wrapped


def test_with_the_seam_closed_it_drafts_like_any_assistant_and_warns_once(tiny_llama, caplog):
    target = tiny_llama(layers=3)
    assistant = OnlineAssistant(tiny_llama(layers=1))
    hf_osd.disable()
    plain = target.generate(PROMPT, max_new_tokens=12, do_sample=False)
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        for _ in range(2):
            output = target.generate(PROMPT, max_new_tokens=12, do_sample=False, assistant_model=assistant)
    assert torch.equal(plain, output)
    assert [r.message for r in caplog.records if "nothing is captured" in r.message] != []
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert assistant.stats.total.requests == 0


def test_a_changed_contract_is_named_with_what_to_install(monkeypatch):
    from transformers.generation.candidate_generator import AssistedCandidateGenerator

    hf_osd.disable()
    monkeypatch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", lambda self, input_ids: None)
    with pytest.raises(RuntimeError, match=r"update_candidate_strategy.*scores.*[Ii]nstall"):
        hf_osd.enable()
    assert not seam.is_enabled()


def test_importing_hf_osd_loads_no_heavy_library():
    """The budget is 0.3 s over `import transformers`; what costs is loading these."""
    code = (
        "import sys, hf_osd; heavy = {'torch', 'transformers', 'trl', 'datasets', 'evaluate', 'peft'} & set(sys.modules);"
        "assert not heavy, heavy; assert 'OnlineAssistant' in dir(hf_osd)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_making_and_serving_an_assistant_loads_no_trainer():
    """trl, datasets and evaluate cost seconds; only learning needs them."""
    code = (
        "import sys; from hf_osd import OnlineAssistant, OnlineConfig, Feedback, FeedbackBuffer, grow_draft, record_answers;"
        "heavy = {'trl', 'datasets', 'evaluate'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_resolves():
    for name in hf_osd.__all__:
        assert getattr(hf_osd, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hf_osd.nonsense  # noqa: B018
