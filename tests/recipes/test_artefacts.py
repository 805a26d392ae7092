"""Every artefact of a run is searched for its prompts, as text and as token ids; and what a malformed prompt leaves in the log."""

import json
import logging
import os
import shutil
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import TrainerCallback, integrations

from hf_osd.distill.trainer import OnlineGKDTrainer
from hf_osd.saving import pretrained
from recipes import distill

WINDOW = 5  # tokens of a prompt in a row: no five are there by chance


@pytest.fixture
def prompts(words) -> list[str]:
    return [" ".join(words[(i * 7 + j * j) % 62] for j in range(6 + i % 3)) for i in range(16)]


def traces_of(prompt: str, words: list[str]) -> Iterator[tuple[str, bytes]]:
    """What could be left of a prompt: each five of its words in a row, as text and as ids in whatever form."""
    said = prompt.split()
    for at in range(len(said) - WINDOW + 1):
        part = said[at : at + WINDOW]
        ids = [2 + words.index(word) for word in part]
        yield "text", " ".join(part).encode()
        yield "tokens", ", ".join(map(repr, part)).encode()
        yield "tokens", json.dumps(part).encode()
        for separator in (", ", ",", " ", "\n", "\t"):
            yield f"decimals by {separator!r}", separator.join(map(str, ids)).encode()
        for code in "hiqHIQfd":
            yield f"struct {code!r}", struct.pack(f"<{WINDOW}{code}", *ids)


def found(prompts: list[str], words: list[str], *folders: Path) -> set[tuple[str, str]]:
    """Files and forms in which anything of the prompts is."""
    forms = [trace for prompt in prompts for trace in traces_of(prompt, words)]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    return {(path.name, form) for path in files for form, trace in forms if trace in path.read_bytes()}


class Tracker(TrainerCallback):
    """Writes down all that it is told, as trackers may."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._path = Path(args.output_dir) / "tracker.txt"
        self._path.write_text(f"{args.to_json_string()} {state} {model.config}\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        with self._path.open("a") as file:
            file.write(f"{state.global_step} {logs} {kwargs}\n")


@pytest.fixture
def run(target_dir, prompts, words, tmp_path, monkeypatch, caplog, capfd):
    """`run(*flags) -> folders with all that a run left`: what it wrote, pushed, put into temporary files, logged at DEBUG and printed.

    On the way an update fails and a prompt is too long: their messages are artefacts too.
    """
    places = {name: tmp_path / name for name in ("out", "temporary", "here", "hub", "said")}
    for place in places.values():
        place.mkdir()
    long = " ".join(words[i % 62] for i in range(600))
    rows = [{"prompt": prompt} for prompt in (*prompts, long)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    learn, learnt = OnlineGKDTrainer.learn, []

    def failing_once(self, requests):
        learnt.append(None)
        if len(learnt) == 2:
            raise ValueError("an update that fails")
        return learn(self, requests)

    monkeypatch.chdir(places["here"])
    monkeypatch.setattr(tempfile, "tempdir", str(places["temporary"]))
    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", lambda self: None)
    monkeypatch.setattr(pretrained, "open_repository", lambda api, repo_id, private: repo_id)
    monkeypatch.setattr(pretrained, "license_of", lambda api, name: {})
    monkeypatch.setattr(
        pretrained, "push_folder", lambda api, repo_id, folder, *rest: shutil.copytree(folder, places["hub"] / repo_id)
    )
    monkeypatch.setattr(OnlineGKDTrainer, "learn", failing_once)
    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [Tracker])
    ours = logging.getLogger("hf_osd")
    monkeypatch.setattr(ours, "setLevel", lambda level: None)
    monkeypatch.setattr(ours, "level", logging.DEBUG)

    def call(*flags):
        settings = [
            "--target",
            target_dir,
            "--draft",
            "grow:0,-1",
            "--stream",
            tmp_path / "one.jsonl",
            "--requests",
            "9",
        ]
        settings += ["--held_back", "4", "--warm_up", "2", "--parity", "2", "--max_new_tokens", "8", "--seed", "0"]
        settings += [
            "--update_interval",
            "2",
            "--gate",
            "true",
            "--learning_rate",
            "1e-3",
            "--learning_budget",
            "1",
            "--checkpoint_every",
            "3",
            "--log_every",
            "2",
        ]
        settings += ["--report_to", "trackio", "--push_to_hub", "me/draft", "--threads", "1"]
        with caplog.at_level(logging.DEBUG):
            assert distill.main([str(flag) for flag in (*settings, "--output_dir", places["out"], *flags)]) == 0
        assert json.loads((places["out"] / "summary.json").read_text())["overall"]["failed_updates"] == 1
        assert "an update that fails" in caplog.text
        assert "skipped 1 prompts" in caplog.text
        (places["said"] / "log.txt").write_text(caplog.text)
        printed = capfd.readouterr()
        (places["said"] / "printed.txt").write_text(printed.out + printed.err)
        return list(places.values())

    call.out = places["out"]
    return call


def test_no_artefact_of_a_run_holds_a_prompt(run, prompts, words):
    folders = run()
    written = {path.name for folder in folders for path in folder.rglob("*") if path.is_file()}
    expected = {"metrics.jsonl", "summary.json", "curves.png", "model.safetensors", "README.md", "osd_config.json"}
    expected |= {"learner.safetensors", "state.json", "manifest.json", "tracker.txt", "log.txt", "printed.txt"}
    assert written >= expected
    assert "buffer.safetensors" not in written
    assert found(prompts, words, *folders) == set()


def test_a_buffer_that_is_asked_for_is_the_only_one_that_does_and_its_owners_alone(run, prompts, words):
    """And the search finds what there is to find."""
    hits = found(prompts, words, *run("--save_buffer", "true"))
    assert {name for name, _ in hits} == {"buffer.safetensors"}
    files = list(run.out.rglob("buffer.safetensors"))
    assert len(files) == 2, "of the last two checkpoints"
    assert {stat.S_IMODE(os.stat(path).st_mode) for path in files} == {0o600}


@pytest.mark.parametrize(
    "form",
    [
        "text",
        "tokens",
        "decimals by ', '",
        "decimals by '\\n'",
        "struct 'h'",
        "struct 'i'",
        "struct 'q'",
        "struct 'f'",
    ],
)
def test_the_search_finds_what_is_planted(prompts, words, tmp_path, form):
    for i in range(9):
        (tmp_path / f"{i}.bin").write_bytes(bytes(range(256)))
    assert found(prompts, words, tmp_path) == set()
    planted = next(trace for name, trace in traces_of(prompts[3], words) if name == form)
    (tmp_path / "8.bin").write_bytes(b"before" + planted + b"after")
    assert ("8.bin", form) in found(prompts, words, tmp_path)


@pytest.mark.parametrize(
    "line", ['{"prompt": "%s"', '{"prompt": ["%s"]}', '{"text": "%s"}', '["%s"]', '{"prompt": "%s"} x']
)
def test_a_malformed_prompt_is_named_by_its_line_and_not_quoted(
    target_dir, prompts, words, tmp_path, caplog, capfd, line
):
    stream = tmp_path / "bad.jsonl"
    stream.write_text(json.dumps({"prompt": prompts[0]}) + "\n" + line % prompts[1] + "\n")
    flags = [
        "--target",
        str(target_dir),
        "--draft",
        "grow:0",
        "--stream",
        str(stream),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with caplog.at_level(logging.DEBUG):
        assert distill.main(flags) == 2
    said = caplog.text + "".join(capfd.readouterr())
    assert "bad.jsonl" in said
    assert not [
        form for prompt in prompts[:2] for form, trace in traces_of(prompt, words) if trace.decode("latin-1") in said
    ]
