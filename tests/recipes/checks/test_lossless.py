"""The long comparison on a tiny model: it counts right, goes on where it stopped, reports a bug, and writes no prompt."""

import json

import pytest
import torch

from hf_osd.saving.state import saved_progress
from recipes.checks import lossless


@pytest.fixture
def run(target_dir, words, tmp_path):
    """`run(*flags) -> exit status` over 9 prompts of two streams, of which the second ends early, into tmp_path/out."""
    for domain, count in (("one", 8), ("two", 3)):
        rows = [{"prompt": " ".join(words[(i * 7 + j) % 62] for j in range(5 + i % 3))} for i in range(count)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(*flags):
        settings = ["--target", target_dir, "--stream", f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"]
        settings += ["--requests", "9", "--max_new_tokens", "8", "--update_interval", "2", "--threads", "1"]
        settings += ["--gate", "false", "--learning_rate", "1e-3", "--learning_budget", "1"]
        settings += ["--output_dir", tmp_path / "out", "--checkpoint_every", "4", "--log_every", "4"]
        return lossless.main([str(flag) for flag in (*settings, *flags)])

    call.out = tmp_path / "out"
    return call


def read(folder):
    rows = [json.loads(line) for line in (folder / "lossless.jsonl").read_text().splitlines()]
    return rows, json.loads((folder / "summary.json").read_text())


def stopping(monkeypatch, error: BaseException, at: int):
    """Raise `error` in place of comparison number `at`."""
    compare, seen = lossless.compare_outputs, []

    def comparing(*args, **kwargs):
        seen.append(None)
        if len(seen) == at:
            raise error
        return compare(*args, **kwargs)

    monkeypatch.setattr(lossless, "compare_outputs", comparing)


@pytest.mark.parametrize("kind", ["padded head", "another tokenizer"])
def test_a_draft_of_another_vocabulary_is_compared_too(run, brought_draft, kind):
    assert run("--draft", brought_draft(kind), "--requests", "4") == 0
    overall = read(run.out)[1]["overall"]
    assert overall["identical"] == 4
    assert overall["drafted"] > 0


def test_rows_and_summary_add_up(run, monkeypatch, capsys):
    lengths, answer = [], lossless.answer

    def answering(target, prompt, *args, **kwargs):
        output = answer(target, prompt, *args, **kwargs)
        lengths.append((len(output) - len(prompt), "assistant_model" in kwargs))
        return output

    monkeypatch.setattr(lossless, "answer", answering)
    assert run() == 0
    rows, summary = read(run.out)
    names = "request id domain new_tokens verdict rounds drafted tested accepted accepted_from_draft alpha alpha_live updates"
    assert set(rows[0]) == set(names.split())
    assert [row["request"] for row in rows] == list(range(9))
    assert [row["domain"] for row in rows] == ["one", "two"] * 3 + ["one"] * 3
    assert len({(row["domain"], row["id"]) for row in rows}) == 9
    assert [row["new_tokens"] for row in rows] == [length for length, assisted in lengths if assisted]
    # Plain decoding comes second, first, second, …
    assert [assisted for _, assisted in lengths] == [True, False, False, True] * 4 + [True, False]

    overall = summary["overall"]
    assert overall["requests"] == overall["identical"] == 9
    assert overall["near_ties"] == overall["mismatches"] == overall["near_ties_per_10k_tokens"] == 0
    assert overall["tokens"] == sum(row["new_tokens"] for row in rows)
    assert overall["drafted"] == sum(row["drafted"] for row in rows) > 0
    assert overall["alpha_live"] == sum(row["accepted"] for row in rows) / sum(row["tested"] for row in rows)
    assert overall["updates"] == rows[-1]["updates"] == 4
    assert summary["checks"] == {"no_mismatches": True, "no_failed_updates": True}
    for name in ("requests", "tokens", "drafted", "accepted", "skipped"):
        assert overall[name] == sum(figures[name] for figures in summary["domains"].values())
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines()[-len(overall) :])
    assert printed["tokens"] == str(overall["tokens"])
    assert printed["failed_updates"] == "0"


def test_a_killed_run_goes_on_from_its_checkpoint_as_if_unbroken(run, monkeypatch):
    # Without replay a checkpoint that follows an update is all that learning depends on.
    straight = run.out.parent / "straight"
    assert run("--replay_ratio", "0", "--output_dir", straight) == 0
    with monkeypatch.context() as patch:
        stopping(patch, RuntimeError("killed"), at=7)
        with pytest.raises(RuntimeError, match="killed"):
            run("--replay_ratio", "0")
    assert run("--replay_ratio", "0", "--resume") == 0
    (rows, summary), (whole, expected) = read(run.out), read(straight)
    assert rows == whole
    assert summary["overall"] == expected["overall"]


def test_ctrl_c_saves_what_was_compared_and_more_requests_may_follow(run, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, KeyboardInterrupt(), at=5)
        assert run() == 130
    assert saved_progress(run.out / "checkpoint")["rows"] == 4
    assert run("--resume", "--requests", "6") == 0
    short, _ = read(run.out)
    assert run("--resume") == 0
    rows, summary = read(run.out)
    assert rows[:6] == short
    assert [row["request"] for row in rows] == list(range(9))
    assert summary["overall"]["updates"] == 4  # counted over all three


def test_a_folder_with_a_comparison_in_it_is_left_as_it_is(run, refused, tmp_path):
    assert run("--requests", "2") == 0
    before = {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()}
    refused(run, says="has a run in it already")
    refused(run, "--overwrite", "--stream", "nowhere.jsonl", says="nowhere.jsonl")
    (tmp_path / "two.jsonl").write_text(
        (tmp_path / "two.jsonl").read_text() + json.dumps({"prompt": "w1 w2 w3"}) + "\n"
    )
    refused(run, "--resume", says="another stream")
    assert {path: path.read_bytes() for path in run.out.rglob("*") if path.is_file()} == before


def test_a_checkpoint_of_other_settings_is_not_resumed(run, refused):
    assert run("--requests", "2") == 0
    refused(run, "--resume", "--lookahead", "heuristic", says="another lookahead")


def test_a_wrong_token_is_a_mismatch_and_the_exit_status_is_one(run, monkeypatch):
    answer, seen = lossless.answer, []

    def answering(target, prompt, *args, **kwargs):
        output = answer(target, prompt, *args, **kwargs)
        if "assistant_model" in kwargs:
            seen.append(None)
            if len(seen) == 2:
                output[len(prompt) + 3] = 2 + output[len(prompt) + 3] % 50
            if len(seen) == 3:
                output = output[:-1]
        return output

    monkeypatch.setattr(lossless, "answer", answering)
    assert run("--requests", "4") == 1
    rows, summary = read(run.out)
    assert [row["verdict"] for row in rows] == ["identical", "mismatch", "mismatch", "identical"]
    assert rows[1]["differs_at"] == 3
    assert rows[1]["logit_difference"] > 1e-3
    assert rows[1]["plain_logit_difference"] == pytest.approx(rows[1]["logit_difference"], abs=1e-4)
    assert rows[2]["differs_at"] == rows[2]["new_tokens"] - 1
    assert rows[2]["logit_difference"] is None
    assert "differs_at" not in rows[0]
    assert summary["overall"]["mismatches"] == 2
    assert not summary["checks"]["no_mismatches"]
    assert run("--requests", "4", "--resume") == 1  # also when nothing is left to serve


def test_a_near_tie_is_counted_and_no_failure(run, monkeypatch):
    monkeypatch.setattr(lossless, "compare_outputs", lambda *args, **kwargs: "near_tie")
    monkeypatch.setattr(lossless, "first_difference", lambda *args: {"differs_at": 1, "logit_difference": 0.0})
    assert run("--requests", "2") == 0
    rows, summary = read(run.out)
    assert [(row["verdict"], row["differs_at"]) for row in rows] == [("near_tie", 1)] * 2
    assert summary["overall"]["near_ties"] == 2
    assert summary["overall"]["near_ties_per_10k_tokens"] == 2e4 / summary["overall"]["tokens"]


def test_a_failed_update_is_counted_and_is_no_mismatch(run, monkeypatch):
    from hf_osd.distill.student import Student

    def failing(self, requests):
        raise RuntimeError("planted")

    monkeypatch.setattr(Student, "learn", failing)
    assert run("--requests", "8") == 0
    _, summary = read(run.out)
    assert summary["overall"]["failed_updates"] == 2  # the second waits for twice as many requests
    assert summary["checks"] == {"no_mismatches": True, "no_failed_updates": False}


def test_the_draft_drafts_unless_a_flag_says_otherwise(run):
    assert run("--requests", "2") == 0
    _, summary = read(run.out)
    config = summary["run"]["config"]
    assert (config["lookahead"], config["num_assistant_tokens"]) == ("constant", 3)
    assert run("--requests", "2", "--lookahead", "heuristic", "--num_assistant_tokens", "2", "--overwrite") == 0
    _, summary = read(run.out)
    config = summary["run"]["config"]
    assert (config["lookahead"], config["num_assistant_tokens"]) == ("heuristic", 2)


def test_no_prompt_is_in_what_it_writes(run, words):
    assert run() == 0
    prompt = " ".join(words[j] for j in range(5))
    ids = ", ".join(str(2 + j) for j in range(5))
    paths = [path for path in run.out.rglob("*") if path.is_file()]
    assert {path.name for path in paths} >= {"lossless.jsonl", "summary.json", "state.json", "learner.safetensors"}
    for path in paths:
        data = path.read_bytes()
        assert prompt.encode() not in data, path
        assert ids.encode() not in data, path
        for dtype in (torch.int32, torch.int64):
            assert torch.arange(2, 7, dtype=dtype).numpy().tobytes() not in data, path


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--requests", "0"], "requests"),
        (["--requests", "12"], "11 prompts"),
        (["--dtype", "int8"], "int8"),
        (["--learn", "false"], "learn"),
        (["--stream", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_named_before_any_work(run, refused, flags, message):
    refused(run, *flags, says=message)
    assert not (run.out / "checkpoint").exists()


def test_prompts_longer_than_the_window_are_skipped_and_counted(run, words, tmp_path):
    rows = [{"prompt": " ".join(words[(i + j) % 62] for j in range(600 if i == 3 else 6))} for i in range(6)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--stream", tmp_path / "long.jsonl", "--requests", "5") == 0
    rows, summary = read(run.out)
    assert "4" not in {row["id"] for row in rows}
    assert summary["overall"]["skipped"] == summary["domains"]["long"]["skipped"] == 1
