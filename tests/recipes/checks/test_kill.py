"""The killed service: three real kills, and that planted corruption is found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_osd.system.files import new_state, states
from recipes.checks import kill
from recipes.common.run_log import RunLog


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run of three kills, by a process of its own: what forks should have had no other threads."""
    out = tmp_path_factory.mktemp("kill")
    command = [sys.executable, "-m", "recipes.checks.kill", "--kills", "3", "--longest", "0.2", "--output_dir", out]
    root = Path(kill.__file__).parents[2]
    return out, subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def test_three_kills_leave_no_corrupt_state_and_cost_an_interval_at_most(killed):
    out, done = killed
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "kills.json").read_text())
    assert report["summary"]["kills"] == len(report["kills"]) == 3
    assert report["summary"]["corrupt"] == 0
    assert report["summary"]["most_lost"] <= report["summary"]["interval"] == 4
    assert report["summary"]["requests"] == report["kills"][-1]["saved"]
    assert report["summary"]["differs_at"] is None, "the rows are those of a run that nobody killed"
    assert "whole" in done.stdout


@pytest.fixture
def service(tmp_path):
    """A service that has served eight requests and stopped; and its arguments."""
    args = kill.KillArguments(output_dir=str(tmp_path))
    RunLog(tmp_path / "service", kill.identity(args))
    kill.serve(args, tmp_path / "service", lambda sent: None, requests=8)
    return args, tmp_path / "service"


def test_a_corrupt_state_is_recognised(service):
    args, directory = service
    whole = kill.check_disk(args, directory, [])
    assert (whole["corrupt"], whole["served"], whole["saved"], whole["lost"]) == (None, 8, 8, 0)
    assert kill.check_disk(args, directory, whole["rows"])["corrupt"] is None

    harms = {
        "passed over": lambda d: _write(states(d / "checkpoint")[0] / "learner.safetensors", b"half"),
        "no saved state": lambda d: shutil.rmtree(d / "checkpoint"),
        "requests in rows": lambda d: _write(d / "metrics.jsonl", b"".join(_lines(d)[:2])),
        "tokens in rows and statistics": lambda d: _mix(d / "checkpoint", "total"),
        "updates in rows and learner": lambda d: _mix(d / "checkpoint", "updates"),
        "rows that were saved before": lambda d: _write(
            d / "metrics.jsonl", b"".join(_lines(d)).replace(b"random", b"mornad", 1)
        ),
    }
    for i, (expected, harm) in enumerate(harms.items()):
        copy = directory.parent / f"copy{i}"
        shutil.copytree(directory, copy)
        harm(copy)
        assert expected in str(kill.check_disk(args, copy, whole["rows"])["corrupt"])


def _lines(directory: Path) -> list[bytes]:
    return (directory / "metrics.jsonl").read_bytes().splitlines(keepends=True)


def _write(path: Path, data: bytes):
    path.write_bytes(data)


def _mix(checkpoint: Path, what: str):
    """A state whose files are whole, and of two moments."""
    newest = states(checkpoint)[0]
    values = json.loads((newest / "state.json").read_text())
    if what == "total":
        values["stats"]["total"]["new_tokens"] -= 1
    else:
        values["learner"]["updates"] -= 1
    with new_state(checkpoint) as folder:
        shutil.copy(newest / "learner.safetensors", folder)
        (folder / "state.json").write_text(json.dumps(values))


def test_a_child_that_fails_by_itself_is_no_kill(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise ValueError("cannot begin")

    monkeypatch.setattr(kill, "serve", fails)
    killing = kill.Killing(kill.KillArguments(output_dir=str(tmp_path)))
    with pytest.raises(RuntimeError, match="ended by itself"):
        killing._serve_and_kill(aim_at_save=False)


def test_an_interval_that_splits_updates_is_refused():
    with pytest.raises(ValueError, match="multiple of 2"):
        kill.KillArguments(checkpoint_every=3)
