"""`recipes/checks/soak.py`, with small numbers: its counts, output and exit status."""

import json

import pytest


@pytest.fixture
def soak():
    from recipes.checks import soak

    return soak


@pytest.fixture
def run(soak, tmp_path):
    """`run(*flags)`: the exit status, and the figures that were written."""

    def call(*flags):
        path = tmp_path / "figures.json"
        status = soak.main(
            [*map(str, flags), "--threads", "1", "--max_new_tokens", "4", "--json", str(path), "--overwrite"]
        )
        return status, json.loads(path.read_text())

    return call


THREADS = ("--what", "threads", "--callers", 3, "--calls", 4, "--update_interval", 2)


def test_calls_of_several_threads_are_counted_and_compared(run, capsys):
    status, figures = run(*THREADS)
    assert status == 0
    assert (figures["calls"], figures["taken_in"], figures["errors"]) == (12, 12, 0)
    assert figures["identical"] + figures["near_tie"] == 12
    assert figures["failed_updates"] == figures["learner_restarts"] == 0
    assert "identical" in capsys.readouterr().out


def test_an_output_that_differs_or_a_call_that_fails_is_counted(run, soak, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(soak, "compare_outputs", lambda *args, **kwargs: "mismatch")
        status, figures = run(*THREADS)
        assert (status, figures["mismatch"]) == (1, 12)

    def breaks(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(soak, "compare_outputs", breaks)
    status, figures = run(*THREADS)
    assert (status, figures["errors"]) == (1, 12)
    assert figures["kinds_of_error"] == [["RuntimeError: a bug", 12]]


MEMORY = ("--what", "memory", "--requests", 12, "--warm_up", 4)


@pytest.mark.parametrize(("grows", "status"), [(0.0, 0), (0.002, 0), (0.01, 1), (-0.01, 1)])
def test_memory_that_changes_after_the_warm_up_fails(run, soak, monkeypatch, grows, status):
    looks = iter(range(100))
    monkeypatch.setattr(soak, "_resident_mb", lambda: 500 * (1 + grows * next(looks)))
    found, figures = run(*MEMORY)
    assert found == status
    assert [requests for requests, _ in figures["curve"]] == [2, 4, 6, 8, 10, 12]
    assert figures["mb_after_warm_up"] == figures["curve"][1][1]
    assert figures["change"] == pytest.approx(figures["curve"][-1][1] / figures["curve"][1][1] - 1)


def test_resident_memory_is_that_of_this_process(soak):
    assert 50 < soak._resident_mb() < 50_000


def test_refreshes_are_timed_while_another_thread_leases(run, capsys):
    status, figures = run("--what", "flip", "--layers", 1, "--width", 64, "--refreshes", 3)
    assert status == 0
    assert figures["refreshes"] == 3
    assert 0 < figures["flip_ms"] <= figures["longest_flip_ms"] <= figures["longest_refresh_ms"]
    assert figures["million_that_train"] < figures["million_parameters"]
    assert figures["leases_alone"] > 0
    assert "longest_lease_ms" in capsys.readouterr().out


def test_bad_flags_are_named(soak, refused):
    for flags, words in (
        (["--what", "nothing"], "choose one of 'threads', 'memory', 'flip'"),
        (["--what", "memory", "--requests", "10", "--warm_up", "10"], "`requests` is 10; give a whole number ≥ 11"),
        (["--callers", "0"], "`callers` is 0"),
    ):
        refused(soak.main, flags, says=words)
