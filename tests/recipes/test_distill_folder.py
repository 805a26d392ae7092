"""The main job and its output folder: what it does not touch, when it goes on, and what it saves whatever fails afterwards."""

import errno
import json
import logging
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, integrations

from hf_osd import OnlineAssistant
from recipes import distill
from recipes.common import figures, report, run_folder, run_log


@pytest.fixture(scope="module")
def inputs(target_dir, words, tmp_path_factory) -> "Run":
    """What a run begins with."""
    folder = tmp_path_factory.mktemp("inputs")
    AutoModelForCausalLM.from_pretrained(target_dir).save_pretrained(folder / "target")
    tokenizer = AutoTokenizer.from_pretrained(target_dir)
    tokenizer.chat_template = "w60 {{ messages[0]['content'] }} w61"
    tokenizer.save_pretrained(folder / "target")
    made = Run(folder)
    made.write(14, words)
    return made


@pytest.fixture
def run(inputs, tmp_path):
    """`run(*flags) -> exit status` of eight requests, into tmp_path/out. Its inputs are the test's own, which it may change."""
    return inputs.copied(tmp_path)


class Run:
    def __init__(self, folder):
        self.target, self.folder, self.out = folder / "target", folder, folder / "out"
        self.stream = folder / "one.jsonl"

    def copied(self, folder) -> "Run":
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Run(folder)

    def write(self, count, words):
        rows = [{"prompt": " ".join(words[(i * 7 + j) % 60] for j in range(5 + i % 3))} for i in range(count)]
        self.stream.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, *flags):
        settings = ["--target", self.target, "--draft", "grow:0,-1", "--stream", self.stream, "--requests", "8"]
        settings += ["--held_back", "4", "--parity", "2", "--max_new_tokens", "8", "--update_interval", "3"]
        settings += ["--gate", "false", "--learning_rate", "1e-3", "--learning_budget", "1", "--threads", "1"]
        settings += ["--output_dir", self.out, "--checkpoint_every", "4", "--log_every", "4", "--seed", "0"]
        return distill.main([str(flag) for flag in (*settings, *flags)])

    def summary(self):
        return json.loads(
            (self.out / "summary.json").read_text(), parse_constant=lambda one: pytest.fail(f"{one} is not JSON")
        )


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stop(run, *flags: str):
    """A run that is interrupted after five of its eight requests."""
    add = run_log.RunLog.add

    def interrupting(self, *args):
        if self.served == 5:
            raise KeyboardInterrupt
        return add(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_log.RunLog, "add", interrupting)
        assert run(*flags) == 130


@pytest.fixture(scope="module")
def finished_once(inputs, tmp_path_factory):
    run = inputs.copied(tmp_path_factory.mktemp("finished"))
    assert run() == 0
    return run


@pytest.fixture(scope="module")
def stopped_once(inputs, tmp_path_factory):
    run = inputs.copied(tmp_path_factory.mktemp("stopped"))
    stop(run)
    return run


@pytest.fixture
def finished(finished_once, tmp_path):
    """A run that came to its end, and is the test's own."""
    return finished_once.copied(tmp_path)


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A run that was stopped, and is the test's own."""
    return stopped_once.copied(tmp_path)


# Whose folder it is.


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--stream", "promtps.jsonl"),
        ("--overwrite", "--stream", "promtps.jsonl"),
        ("--overwrite", "--draft", "grow:0,9"),
        ("--overwrite", "--held_back", "14"),
        ("--overwrite", "--report_to", "nobody"),
        ("--overwrite", "--max_new_tokens", "600"),
        ("--resume", "--overwrite"),
        ("--resume", "--seed", "1"),
    ],
    ids=" ".join,
)
def test_what_is_refused_leaves_the_run_that_is_there_as_it_is(finished, flags):
    before = contents(finished.out)
    assert finished(*flags) == 2
    assert contents(finished.out) == before


def test_a_run_starts_anew_in_the_place_of_another_when_asked(finished):
    assert finished("--overwrite", "--requests", "4") == 0
    assert len((finished.out / "metrics.jsonl").read_text().splitlines()) == 4
    assert finished.summary()["domains"]["one"]["requests"] == 4
    assert finished("--resume", "--requests", "4") == 0, "its checkpoint is the new run's"


def test_a_second_job_is_kept_out_of_the_folder(run, refused):
    with run_folder.RunFolder(run.out):
        refused(run, says="in use by another process")
    assert run() == 0


@pytest.mark.parametrize("name", ["out", "out/draft", "link"])
def test_no_input_lies_where_the_run_writes(run, refused, name):
    run.out.mkdir()
    (run.folder / "link").symlink_to(run.out)
    model = run.folder / name
    AutoModelForCausalLM.from_pretrained(run.target).save_pretrained(model)
    before = contents(run.out)
    refused(run, "--draft", model, "--overwrite", says="which would be written over")
    assert contents(run.out) == before


# What a run goes on with.


def test_a_run_that_was_stopped_goes_on_wherever_its_inputs_lie_now(stopped):
    moved = stopped.folder / "elsewhere"
    moved.mkdir()
    (stopped.folder / "target").rename(moved / "target")
    (stopped.folder / "one.jsonl").rename(moved / "one.jsonl")
    stopped.target, stopped.stream = moved / "target", moved / "one.jsonl"
    assert stopped("--resume") == 0
    assert stopped.summary()["domains"]["one"]["requests"] == 8


def grow(run, words):
    run.write(20, words)


def swap(run, words):
    """As many prompts, with the same numbers."""
    lines = run.stream.read_text().splitlines(keepends=True)
    run.stream.write_text("".join([*lines[:3], json.dumps({"prompt": "w5 w6 w7 w8"}) + "\n", *lines[4:]]))


def group(run, words):
    """The same prompts, alike now, which are held back together."""
    lines = [json.loads(line) | {"group": str(i // 2)} for i, line in enumerate(run.stream.read_text().splitlines())]
    run.stream.write_text("".join(json.dumps(line) + "\n" for line in lines))


def train(run, words):
    model = AutoModelForCausalLM.from_pretrained(run.target)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.01)  # of no layer of the draft
    model.save_pretrained(run.target)


def template(run, words):
    tokenizer = AutoTokenizer.from_pretrained(run.target)
    tokenizer.chat_template = "w61 {{ messages[0]['content'] }} w60"
    tokenizer.save_pretrained(run.target)


@pytest.mark.parametrize(
    ("change", "flags", "says"),
    [
        (grow, (), "another stream, held_back_prompts"),
        (swap, (), "another stream"),
        (group, (), "another stream, held_back_prompts"),
        (template, (), "another chat_template, held_back_prompts"),
        (train, (), "another target"),
        (None, ("--no_chat_template",), "another chat_template, held_back_prompts"),
        (None, ("--seed", "1"), "held_back_prompts"),
        (None, ("--held_back", "5"), "another held_back, held_back_prompts"),
        (None, ("--draft", "grow:0"), "another draft"),
        (None, ("--batch_size", "8"), "another batch_size"),
        (None, ("--learn", "off"), "another learn"),
    ],
)
def test_it_does_not_go_on_with_anything_else(stopped, words, refused, monkeypatch, change, flags, says):
    if change is not None:
        change(stopped, words)
    before = contents(stopped.out)
    monkeypatch.setattr(OnlineAssistant, "score", lambda *args: pytest.fail("something was scored"))
    refused(stopped, "--resume", *flags, says=says)
    assert contents(stopped.out) == before


def test_resuming_warns_of_held_back_prompts_that_may_have_been_learnt(stopped, words, refused):
    grow(stopped, words)
    refused(stopped, "--resume", says="Prompts that have been learnt may now be held back")


# A draft that does not learn.


def test_a_draft_that_does_not_learn_is_served_to_the_end_and_can_be_stopped(run):
    stop(run, "--learn", "off", "--warm_up", "2")
    assert run("--learn", "off", "--warm_up", "2", "--resume") == 0
    summary = run.summary()
    assert summary["domains"]["one"]["requests"] == 8
    assert summary["overall"]["updates"] == 0
    assert summary["domains"]["one"]["alpha_before"] == summary["domains"]["one"]["alpha_after"]
    [served] = re.findall(r"(\d+) requests, 0 updates", (run.out / "draft" / "README.md").read_text())
    assert int(served) >= 8, "statistics go on"


def test_nor_does_one_that_finds_no_room_to_learn_end_the_job(run, caplog):
    assert run("--memory_budget", "1") == 0
    assert run.summary()["overall"]["updates"] == 0


# What is saved, whatever fails afterwards.


def broken(*args, **kwargs):
    raise RuntimeError("it broke")


@pytest.mark.parametrize(
    ("place", "name", "left_out"),
    [
        (report.RunReport, "plot", "curves.png"),
        (report.RunReport, "__str__", None),
        (OnlineAssistant, "write_card", None),
    ],
)
def test_what_is_only_looked_at_loses_nothing(run, monkeypatch, caplog, place, name, left_out):
    monkeypatch.setattr(place, name, broken)
    assert run() == 0
    assert "it broke" in caplog.text
    assert run.summary()["domains"]["one"]["requests"] == 8
    assert (run.out / "draft" / "model.safetensors").is_file()
    assert (run.out / "curves.png").exists() == (left_out != "curves.png")


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("place", "name", "lost"),
    [
        (OnlineAssistant, "save_state", "checkpoint"),
        (OnlineAssistant, "save_pretrained", "draft"),
        (report.RunReport, "write", "summary.json"),
    ],
)
def test_what_cannot_be_saved_costs_nothing_else_and_is_the_exit_status(run, monkeypatch, refused, place, name, lost):
    monkeypatch.setattr(place, name, full)
    refused(run, says="No space left")
    wanted = {"checkpoint", "draft", "summary.json", "curves.png", "metrics.jsonl"}
    assert wanted - {path.name for path in run.out.iterdir()} == {lost}


def test_a_figure_that_cannot_be_had_at_the_end_is_null(run, monkeypatch):
    score, seen = OnlineAssistant.score, []

    def scoring(self, feedback):
        seen.append(None)
        return score(self, feedback) if len(seen) == 1 else broken()

    monkeypatch.setattr(OnlineAssistant, "score", scoring)
    assert run() == 0
    figures = run.summary()["domains"]["one"]
    assert figures["alpha_after"] is None
    assert figures["alpha_before"] >= 0


def test_figures_that_are_not_known_are_null_in_every_file(run):
    model = AutoModelForCausalLM.from_pretrained(run.target)
    model.generation_config.repetition_penalty = 1.1  # α of requests in which nothing is drafted is then unknown
    model.save_pretrained(run.target)
    assert run("--draft_cost", "1.0") == 0
    figures = run.summary()["domains"]["one"]
    assert figures["alpha_first_fifth"] is None
    for path in [*run.out.rglob("*.json"), *run.out.rglob("*.jsonl")]:
        for line in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(line, parse_constant=lambda one: pytest.fail(f"{one} is not JSON"))


def test_recent_figures_of_calls_without_rounds_are_not_known(tmp_path):
    log = run_log.RunLog(tmp_path, {})
    log.rows = [{"alpha": None, "rounds": 0, "new_tokens": 3, "decode_seconds": 0.5}]
    assert log.recent(1) == {"alpha": None, "tokens_per_round": None, "tokens_per_second": 6.0}
    assert figures.or_none(math.nan) is None


class Tracker(TrainerCallback):
    def __init__(self):
        self.told = []
        Tracker.made = self

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.told.append(state.global_step)
        broken()


def test_a_tracker_that_fails_is_dropped_and_nothing_is_lost(run, monkeypatch, caplog):
    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [Tracker])
    assert run("--report_to", "trackio") == 0
    assert Tracker.made.told == [4]
    assert caplog.text.count("Tracker gets no more figures") == 1
    assert run.summary()["domains"]["one"]["requests"] == 8


def test_a_tracker_that_cannot_begin_is_named_before_any_work(run, monkeypatch, refused):
    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [broken])
    refused(run, "--report_to", "trackio", says="`report_to` is 'trackio', which cannot begin: it broke")
    assert not (run.out / "metrics.jsonl").exists()


@pytest.mark.parametrize("word", ["false", "none"])
def test_nothing_is_pushed_where_the_flag_says_so(run, monkeypatch, word):
    monkeypatch.setattr(OnlineAssistant, "push_to_hub", lambda *args, **kwargs: pytest.fail("it was pushed"))
    assert run("--push_to_hub", word, "--report_to", word) == 0


def test_a_push_that_fails_comes_last_and_is_the_exit_status(run, monkeypatch, refused, capsys):
    monkeypatch.setattr(OnlineAssistant, "push_to_hub", full)
    refused(run, "--push_to_hub", "me/draft", says="No space left")
    assert "alpha before" in capsys.readouterr().out
    assert run.summary()["domains"]["one"]["requests"] == 8


# Names that data has.


NAMES = [
    "under_$5_and_over_$10",
    "$x^{",
    r"\frac{",
    "a\nb\tc",
    "../../up",
    "%s {0} {x}",
    "x" * 300,
    "日本",
    "a|b",
    "---",
]


@pytest.mark.pictures
def test_a_domain_may_have_any_name(run, words, capsys):
    lines = []
    for k, name in enumerate(NAMES):
        rows = [" ".join(words[(i * 7 + j * (k + 1)) % 60] for j in range(5)) for i in range(4)]
        lines += [json.dumps({"prompt": f"w{k} {row}", "domain": name}) + "\n" for row in rows]
    run.stream.write_text("".join(lines))
    assert run("--requests", "1", "--held_back", "1", "--parity", "1", "--log_every", "1") == 0
    assert list(run.summary()["domains"]) == NAMES
    assert (run.out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in run.folder.iterdir()} == {"out", "target", "one.jsonl"}
    [table] = [part for part in capsys.readouterr().out.split("domain ") if "alpha before" in part]
    assert len(table.splitlines()[: len(NAMES) + 1]) == len(NAMES) + 1
    assert "a b c" in table


@pytest.mark.pictures
def test_a_picture_is_drawn_of_names_as_they_are(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    texts = []
    save = Figure.savefig

    def saving(self, *args, **kwargs):
        texts.extend(text for axis in self.axes for text in axis.texts)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", saving)
    log = run_log.RunLog(tmp_path, {})
    log.rows = [
        {"request": i, "domain": name, "alpha": None, "learn_seconds": 0.0} for i, name in enumerate(("$5", "$x^{"))
    ]
    report.RunReport(log, {}, {}, {}).plot(tmp_path)
    assert [text.get_text() for text in texts] == ["$5", "$x^{"]
    assert not any(text.get_parse_math() for text in texts)


# What a target's generation config asks for.


@pytest.mark.parametrize(
    "asks",
    [
        {"num_beams": 4},
        {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"stop_strings": ["w5"]},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "temperature": 0.7},
    ],
    ids=lambda asks: "-".join(asks),
)
def test_a_generation_config_that_asks_for_more_is_served_greedily_with_a_warning(run, caplog, asks):
    path = run.target / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | asks))
    with caplog.at_level(logging.WARNING):
        assert run("--requests", "4", "--lookahead", "constant") == 0
    figures = run.summary()["domains"]["one"]
    assert (figures["requests"], figures["compared"], figures["mismatches"]) == (4, 2, 0)
    assert run.summary()["overall"]["rounds"] > 0
    first = next(iter(asks))
    assert (f"asks for {first}=" in caplog.text) == (first != "do_sample")


def test_a_prompt_that_the_tokenizer_refuses_is_named_and_not_quoted(run, refused, caplog):
    tokenizer = AutoTokenizer.from_pretrained(run.target)
    tokenizer.chat_template = "{{ raise_exception('no users here') }}"
    tokenizer.save_pretrained(run.target)
    refused(
        run,
        says="one: the target's tokenizer refuses the prompt with the id 1 (TemplateError); leave it out, or try --no_chat_template",
    )
    assert "w0" not in caplog.text
    assert run("--no_chat_template", "--requests", "1") == 0
