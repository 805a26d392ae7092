"""The generation strategy that hf_osd writes for the Hub: what the open seam does, with the seam closed and nothing patched."""

import ast
import inspect
import logging
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationMixin, StoppingCriteria, TextStreamer

import hf_osd
from hf_osd import OnlineAssistant, grow_draft
from hf_osd.generation import patch as seam
from hf_osd.saving.custom_generate import write_custom_generate

PROMPTS = torch.randint(2, 64, (6, 1, 6), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 16, "do_sample": False}


@pytest.fixture(autouse=True)
def _the_seam_is_as_it_was():
    was = seam.is_enabled()
    yield
    (seam.enable if was else seam.disable)()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the strategy, and the modules that transformers loads from it in a place of their own."""
    import transformers.dynamic_module_utils

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    write_custom_generate(tmp_path / "strategy")
    return {"custom_generate": str(tmp_path / "strategy"), "trust_remote_code": True}


def make(target, **config):
    """An assistant that drafts whether or not it pays; making it opens the seam, which is then closed."""
    settings = {
        "update_interval": 2,
        "gate": False,
        "learning_rate": 1e-3,
        "learning_budget": 1.0,
        "seed": 0,
        "lookahead": "constant",
        "num_assistant_tokens": 3,
        "suffix_cache": False,
    }
    assistant = OnlineAssistant(grow_draft(target, (0, -1)), **settings | config)
    hf_osd.disable()
    return assistant


def test_it_does_what_the_open_seam_does_and_patches_nothing(target, folder):
    by_strategy, by_seam = make(target), make(target)
    names = ("generate", "_get_candidate_generator", "_assisted_decoding")
    methods, instance = [vars(GenerationMixin)[name] for name in names], set(vars(target))
    for prompt in PROMPTS:
        output = target.generate(prompt, assistant_model=by_strategy, **folder, **GREEDY)
        assert not seam.is_enabled()
        assert [vars(GenerationMixin)[name] for name in names] == methods
        assert set(vars(target)) == instance
        assert torch.equal(output, target.generate(prompt, **GREEDY))
        hf_osd.enable()
        assert torch.equal(target.generate(prompt, assistant_model=by_seam, **GREEDY), output)
        hf_osd.disable()
    a, b = by_strategy.stats, by_seam.stats
    assert a.updates == b.updates > 0
    assert (a.total.requests, a.total.drafted, a.total.accepted, a.total.rounds) == (
        6,
        b.total.drafted,
        b.total.accepted,
        b.total.rounds,
    )
    assert a.total.drafted > 0
    for (name, p), (_, q) in zip(by_strategy.serving.weights(), by_seam.serving.weights(), strict=True):
        assert torch.equal(p, q), name


def test_it_works_beside_the_open_seam(target, folder):
    assistant = make(target)
    hf_osd.enable()
    for prompt in PROMPTS:
        output = target.generate(prompt, assistant_model=assistant, **folder, **GREEDY)
        assert torch.equal(output, target.generate(prompt, **GREEDY))
    assert assistant.stats.total.requests == len(PROMPTS)
    assert assistant.stats.updates > 0


def test_sampling_follows_the_seed_as_with_the_open_seam(target, folder):
    outputs = []
    for by_strategy in (True, False):
        assistant = make(target, draft_cost=0.1)
        if not by_strategy:
            hf_osd.enable()
        torch.manual_seed(5)
        options = folder if by_strategy else {}
        outputs.append(
            [
                target.generate(p, assistant_model=assistant, max_new_tokens=16, do_sample=True, **options)
                for p in PROMPTS
            ]
        )
        hf_osd.disable()
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_a_streamer_hears_every_token_and_the_end(target, folder):
    class Heard(TextStreamer):
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    heard = Heard()
    output = target.generate(PROMPTS[0], assistant_model=make(target), streamer=heard, **folder, **GREEDY)
    assert heard.tokens == output[0].tolist()
    assert heard.ended == 1


def test_stopping_criteria_stop_where_plain_decoding_stops(target, folder):
    class AtLength(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((1,), input_ids.shape[1] >= 13, dtype=torch.bool)

    options = {"stopping_criteria": [AtLength()], **GREEDY}
    for prompt in PROMPTS:
        output = target.generate(prompt, assistant_model=make(target), **folder, **options)
        assert torch.equal(output, target.generate(prompt, **options))


def test_a_call_is_over_when_it_has_come_back(target, folder):
    assistant = make(target)
    target.generate(PROMPTS[0], assistant_model=assistant, **folder, **GREEDY)
    assistant.collect()
    assert assistant.stats.total.requests == 1
    assert seam.running_calls() == []
    assert assistant.flush()


def test_a_call_that_breaks_off_is_taken_in(target, folder):
    class Broken(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise RuntimeError("broken")

    assistant = make(target)
    with pytest.raises(RuntimeError, match="broken"):
        target.generate(PROMPTS[0], assistant_model=assistant, stopping_criteria=[Broken()], **folder, **GREEDY)
    assistant.collect()
    assert seam.running_calls() == []
    assert assistant.stats.total.requests == 1


def test_a_tenant_and_an_assistant_without_a_draft_are_served(target, folder):
    alone = OnlineAssistant()
    hf_osd.disable()
    for assistant in (make(target, suffix_cache=True).tenant("acme"), alone):
        for prompt in PROMPTS[:2]:
            output = target.generate(prompt, assistant_model=assistant, **folder, **GREEDY)
            assert torch.equal(output, target.generate(prompt, **GREEDY))
        assert assistant.stats.total.requests == 2


def test_other_threads_on_the_same_target_see_no_seam(target, folder):
    """While a call of the strategy runs, a stock assisted call of another thread goes its own way."""
    stock, seen = grow_draft(target), []

    class InTheMiddle(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            if not seen:
                seen.append(None)
                thread = threading.Thread(
                    target=lambda: seen.append(target.generate(PROMPTS[1], assistant_model=stock, **GREEDY))
                )
                thread.start()
                thread.join()
            return torch.zeros(1, dtype=torch.bool)

    assistant = make(target)
    target.generate(PROMPTS[0], assistant_model=assistant, stopping_criteria=[InTheMiddle()], **folder, **GREEDY)
    assert torch.equal(seen[1], target.generate(PROMPTS[1], **GREEDY))
    assert assistant.stats.total.requests == 1


def test_hooks_and_a_replaced_forward_of_the_target_are_kept(target, folder, monkeypatch):
    calls, forward = [], target.forward

    def counted(*args, **kwargs):
        calls.append("forward")
        return forward(*args, **kwargs)

    monkeypatch.setattr(target, "forward", counted)
    counted.__signature__ = inspect.signature(forward)
    hook = target.register_forward_hook(lambda *args: calls.append("hook"))
    try:
        assistant = make(target)
        target.generate(PROMPTS[0], assistant_model=assistant, **folder, **GREEDY)
    finally:
        hook.remove()
    total = assistant.stats.total
    forwards = total.rounds + total.verification_forwards
    assert (calls.count("forward"), calls.count("hook")) == (forwards, forwards)


def test_any_other_assistant_drafts_as_ever_and_is_told_of(target, folder, caplog):
    stock = grow_draft(target)
    seam._warn_not_learning.cache_clear()
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        for prompt in PROMPTS[:2]:
            output = target.generate(prompt, assistant_model=stock, **folder, **GREEDY)
            assert torch.equal(output, target.generate(prompt, **GREEDY))
    assert caplog.text.count("LlamaForCausalLM, which learns nothing; pass OnlineAssistant(draft)") == 1


def test_without_an_assistant_it_is_plain_decoding(target, folder):
    assert torch.equal(target.generate(PROMPTS[0], **folder, **GREEDY), target.generate(PROMPTS[0], **GREEDY))


def test_code_that_is_not_trusted_is_not_run(target, folder):
    with pytest.raises(ValueError, match="trust_remote_code"):
        target.generate(PROMPTS[0], custom_generate=folder["custom_generate"], trust_remote_code=False, **GREEDY)


def test_a_transformers_that_has_changed_is_refused(target, folder, monkeypatch):
    assistant = make(target)
    monkeypatch.setattr(GenerationMixin, "_assisted_decoding", lambda self: None)
    with pytest.raises(RuntimeError, match="hf_osd needs its parameters"):
        target.generate(PROMPTS[0], assistant_model=assistant, **folder, **GREEDY)


def test_what_is_written_needs_the_package_and_nothing_else(tmp_path):
    write_custom_generate(tmp_path)
    assert sorted(path.name for path in (tmp_path / "custom_generate").iterdir()) == [
        "generate.py",
        "requirements.txt",
    ]
    requirement = (tmp_path / "custom_generate" / "requirements.txt").read_text()
    assert requirement == f"hf-osd>={hf_osd.__version__}\n"
    code = ast.parse((tmp_path / "custom_generate" / "generate.py").read_text())
    [imported] = [node for node in ast.walk(code) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imported.module == "hf_osd.generation.patch"


def test_requirements_that_are_not_met_are_named(target, folder):
    (Path(folder["custom_generate"]) / "custom_generate" / "requirements.txt").write_text("hf-osd>=999.0\n")
    with pytest.raises(ImportError, match=r"hf-osd>=999\.0"):
        target.generate(PROMPTS[0], assistant_model=make(target), **folder, **GREEDY)


@pytest.mark.parametrize("revision", [None, "pinned"])
def test_a_repository_holds_draft_and_strategy(hub, target, revision):
    assistant = make(target)
    address = assistant.push_to_hub("me/draft", custom_generate=True)
    assert {"custom_generate/generate.py", "custom_generate/requirements.txt"} <= set(hub.files("me/draft"))
    card = hub.files("me/draft")["README.md"].decode()
    assert 'custom_generate="me/draft"' in card
    assert "- custom_generate\n" in card
    again = OnlineAssistant.from_pretrained("me/draft")
    hf_osd.disable()
    where = {"custom_generate": "me/draft", "trust_remote_code": True}
    if revision is not None:
        where["revision"] = address.rpartition("/")[2]
    for prompt in PROMPTS[:3]:
        output = target.generate(prompt, assistant_model=again, **where, **GREEDY)
        assert torch.equal(output, target.generate(prompt, **GREEDY))
    assert again.stats.updates > 0


def test_a_draft_loaded_with_trust_in_its_code_still_drafts(hub, target):
    """transformers makes the repository's strategy its `generate`."""
    make(target).push_to_hub("me/draft", custom_generate=True)
    draft = AutoModelForCausalLM.from_pretrained("me/draft", trust_remote_code=True)
    assert "generate" in vars(draft)
    plain = target.generate(PROMPTS[0], **GREEDY)
    assert torch.equal(target.generate(PROMPTS[0], assistant_model=draft, **GREEDY), plain)
    assistant = OnlineAssistant(draft)
    assert torch.equal(target.generate(PROMPTS[0], assistant_model=assistant, **GREEDY), plain)


def test_no_code_is_pushed_unasked(hub, target):
    make(target).push_to_hub("me/draft")
    assert not any(path.endswith(".py") for path in hub.files("me/draft"))
