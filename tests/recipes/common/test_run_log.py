"""`RunLog`: rows and checkpoints agree, whatever ends the run; and a full disk does not end it."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest

from hf_osd import OnlineAssistant
from hf_osd.metrics.stats import CallStats, Stats
from hf_osd.system.files import new_state, states
from recipes import distill
from recipes.common import run_log
from recipes.common.run_log import RunLog


class Assistant:
    """What `save` needs of one."""

    def save_state(self, directory, with_buffer=False, progress=None):
        with new_state(directory) as folder:
            (folder / "state.json").write_text(json.dumps({"version": 3, "progress": progress}))


def served(log: RunLog, count: int):
    for _ in range(count):
        log.add("one", Stats(last=CallStats(requests=1, new_tokens=3, rounds=2)), {"decode_seconds": 0.1})


def lines(directory: Path) -> list[int]:
    return [json.loads(line)["request"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_resumed_run_goes_on_at_its_checkpoint_and_drops_the_rows_after_it(tmp_path):
    log = RunLog(tmp_path, {"a": 1}).begin()
    served(log, 3)
    log.add_pair("one", "identical", 0.2, 0.1)
    log.before = {"one": [0.5, 0.25], "two": None}
    log.save(Assistant())
    known = (tmp_path / "metrics.jsonl").read_bytes()
    served(log, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"request": 5, "dom')  # killed in the middle of a row
    again = RunLog(tmp_path, {"a": 1}, resume=True).begin()
    assert (tmp_path / "metrics.jsonl").read_bytes() == known
    assert (again.rows, again.pairs, again.before) == (log.rows[:3], log.pairs, log.before)
    served(again, 1)
    assert lines(tmp_path) == [0, 1, 2, 3]


def test_scores_of_a_run_that_knew_alpha_alone_go_on_as_a_first_step(tmp_path):
    log = RunLog(tmp_path, {}).begin()
    log.before = {"one": 0.5, "two": None}
    log.save(Assistant())
    assert RunLog(tmp_path, {}, resume=True).before == {"one": [0.5], "two": None}


def test_a_checkpoint_does_not_grow_with_the_rows(tmp_path):
    log = RunLog(tmp_path, {}).begin()
    sizes = []
    for _ in range(2):
        served(log, 40)
        log.save(Assistant())
        sizes.append((states(log.checkpoint)[0] / "state.json").stat().st_size)
    assert abs(sizes[1] - sizes[0]) < 10


def test_a_run_that_starts_afresh_forgets_the_older_ones_checkpoint(tmp_path):
    log = RunLog(tmp_path, {}).begin()
    served(log, 2)
    log.save(Assistant())
    afresh = RunLog(tmp_path, {})
    assert afresh.served == 0
    assert lines(tmp_path) == [0, 1], "nothing is touched before it begins"
    afresh.begin()
    assert lines(tmp_path) == []
    assert RunLog(tmp_path, {}, resume=True).served == 0


def test_a_run_that_began_with_a_field_that_is_gone_goes_on_only_if_that_asked_for_what_is_done_now(tmp_path):
    for value, goes_on in (("uniform", True), ("loss", False)):
        folder = tmp_path / value
        log = RunLog(folder, {"config": {"top_k": 7, "replay_by": value}}).begin()
        served(log, 2)
        log.save(Assistant())
        if goes_on:
            assert RunLog(folder, {"config": {"top_k": 7}}, resume=True).served == 2
        else:
            with pytest.raises(ValueError, match="cannot go on as it began: `replay_by` is no field any more"):
                RunLog(folder, {"config": {"top_k": 7}}, resume=True)


@pytest.mark.parametrize("harm", ["shorter", "gone", "not JSON"])
def test_rows_that_the_checkpoint_knows_and_the_file_lacks_are_named(tmp_path, harm):
    log = RunLog(tmp_path, {}).begin()
    served(log, 3)
    log.save(Assistant())
    path = tmp_path / "metrics.jsonl"
    data = path.read_bytes()
    if harm == "shorter":
        path.write_bytes(b"".join(data.splitlines(keepends=True)[:2]))
    elif harm == "gone":
        path.unlink()
    else:
        path.write_bytes(data.replace(b"{", b"[", 1))
    with pytest.raises(ValueError, match=r"lacks rows of the 3 .*start anew with --overwrite") as error:
        RunLog(tmp_path, {}, resume=True)
    assert str(path) in str(error.value)


def test_rows_wait_for_a_disk_that_refuses_them(tmp_path, monkeypatch, caplog):
    log = RunLog(tmp_path, {}).begin()
    served(log, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        served(log, 2)
        with pytest.raises(OSError, match="No space left"):
            log.save(Assistant())
    assert "Row 2 waits" in caplog.text
    assert lines(tmp_path) == [0, 1]
    served(log, 1)
    assert lines(tmp_path) == [0, 1, 2, 3, 4]
    log.save(Assistant())
    assert RunLog(tmp_path, {}, resume=True).served == 5


class HalfWritten:
    """A file that takes ten bytes, and then the disk is full."""

    def __init__(self, file):
        self._file = file

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def write(self, data: bytes):
        self._file.write(data[:10])
        full()


def test_half_a_row_on_a_disk_that_filled_up_is_written_over(tmp_path, monkeypatch):
    log, opened = RunLog(tmp_path, {}).begin(), Path.open
    served(log, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: HalfWritten(opened(path, mode)))
        served(log, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b'{"request"')
    served(log, 1)
    assert lines(tmp_path) == [0, 1, 2]


# The main job.


@pytest.fixture
def run(target_dir, words, tmp_path):
    """`run(*flags) -> exit status` on a stream of twelve requests, with nothing in it that a restart begins anew."""
    rows = [{"prompt": " ".join(words[(i * 7 + j) % 62] for j in range(5 + i % 3))} for i in range(16)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*flags):
        settings = ["--target", target_dir, "--draft", "grow:0,-1", "--stream", tmp_path / "one.jsonl"]
        settings += ["--requests", "12", "--held_back", "4", "--parity", "1", "--max_new_tokens", "8", "--seed", "0"]
        settings += [
            "--update_interval",
            "3",
            "--batch_size",
            "8",
            "--lookahead",
            "constant",
            "--suffix_cache",
            "false",
        ]
        settings += ["--gate", "false", "--replay_ratio", "0", "--checkpoint_every", "3", "--threads", "1"]
        settings += ["--learning_rate", "1e-3", "--learning_budget", "1"]
        return distill.main([str(flag) for flag in (*settings, "--output_dir", call.out, *flags)])

    call.out = tmp_path / "out"
    return call


def without_clocks(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith("_seconds")} for row in rows]


def test_a_killed_job_goes_on_as_if_it_had_not_been(run, monkeypatch):
    add = RunLog.add

    def killed(self, *args):
        if self.served == 8:
            raise RuntimeError("killed")
        return add(self, *args)

    straight = run.out.parent / "straight"
    assert run("--output_dir", straight) == 0
    with monkeypatch.context() as patch:
        patch.setattr(run_log.RunLog, "add", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run()
    assert len(without_clocks(run.out)) == 8
    assert run("--resume", "true") == 0
    rows = without_clocks(run.out)
    assert rows == without_clocks(straight)
    assert rows[-1]["updates"] == 4


@pytest.fixture
def refusing(monkeypatch):
    """The states that cannot be written: `refusing({2})` for the second."""

    def refuse(numbers):
        save, seen = OnlineAssistant.save_state, []

        def saving(self, *args, **kwargs):
            seen.append(None)
            return full() if len(seen) in numbers else save(self, *args, **kwargs)

        monkeypatch.setattr(OnlineAssistant, "save_state", saving)
        return seen

    return refuse


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_job_and_the_next_is_tried(run, refusing, caplog):
    seen = refusing({2, 3})
    with caplog.at_level(logging.ERROR):
        assert run() == 0
    assert len(seen) == 5
    assert [line for line in caplog.messages if "serving goes on" in line] != []
    assert "No checkpoint after 6 requests" in caplog.text
    assert "No space left" in caplog.text
    assert len(without_clocks(run.out)) == 12
    assert len(states(run.out / "checkpoint")) == 2


def test_the_last_checkpoint_that_cannot_be_written_is_the_exit_status(run, refusing, refused):
    refusing(range(1, 100))
    refused(run, says="No space left")
    assert len(without_clocks(run.out)) == 12, "all was served"


def test_an_output_directory_that_cannot_be_written_is_named_before_any_work(run, refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(run, "--output_dir", tmp_path / "file" / "out", says=str(tmp_path / "file"))


def test_a_truncated_checkpoint_is_passed_over_or_named(run, refused, caplog):
    assert run() == 0
    newest, before = states(run.out / "checkpoint")
    (newest / "learner.safetensors").write_bytes(b"half")
    assert run("--resume", "true") == 0
    assert f"{newest / 'learner.safetensors'} is damaged" in caplog.text
    for folder in states(run.out / "checkpoint"):
        (folder / "state.json").write_text("{")
    refused(run, "--resume", "true", says="start afresh")
    assert "state.json is damaged" in caplog.text
