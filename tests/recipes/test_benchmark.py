"""The benchmark and the replay on a tiny model: the figures they print are there, whole and of the right sort."""

import json

import benchmark
import pytest
import replay

from hf_osd import OnlineConfig


@pytest.fixture
def flags(target_dir, words, tmp_path):
    """Flags that name a tiny target and a stream of 12 prompts."""
    rows = [{"prompt": " ".join(words[(i * 7 + j) % 62] for j in range(5))} for i in range(12)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["--target", target_dir, "--stream", tmp_path / "s.jsonl", "--max_new_tokens", "8", "--threads", "1"]
    return [str(name) for name in (*names, "--json", tmp_path / "out.json")]


def test_overhead_reports_capture_and_learning(flags, tmp_path, capsys):
    assert benchmark.main([*flags, "--requests", "2", "--repeats", "2", "--update_interval", "3"]) == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures == json.loads(capsys.readouterr().out)
    capture, learning = figures["overhead"]["capture"], figures["overhead"]["learning"]
    assert set(capture["round_ms"]) == {"draft", "target", "capture", "python"}
    assert all(value > 0 for value in capture["round_ms"].values())
    assert 0 < capture["capture_share_of_decode"]["median"] < 1
    assert capture["bytes_a_position"] <= 1024
    assert learning["failed_updates"] == 0
    assert (
        learning["tokens_an_update"] == 3 * (1 + 3) * 8 or learning["tokens_an_update"] < 3 * 4 * 8
    )  # EOS may come early
    assert figures["machine"]["threads"] == 1


def test_replayed_arms_learn_from_the_same_answers(flags, tmp_path):
    arms = "learning_rate=0.005;learning_rate=1e-7"
    assert (
        replay.main(
            [*flags, "--requests", "8", "--held_back", "4", "--score_every", "4", "--arms", arms, "--seed", "0"]
        )
        == 0
    )
    fast, slow = json.loads((tmp_path / "out.json").read_text())
    assert fast["alpha"][0] == slow["alpha"][0]  # the same draft, on the same prompts
    assert len(fast["alpha"]) == 3
    assert slow["alpha"][-1] == slow["alpha"][0]  # a rate that moves nothing
    assert (fast["updates"], fast["failed"]) == (1, 0)


def test_an_arm_is_read_over_the_base_or_named():
    label, config = replay.read_arm(" batch_size=3, divergence=jsd ,learning_rate=1e-3", OnlineConfig(replay=5.0))
    assert label == "batch_size=3, divergence=jsd ,learning_rate=1e-3"
    assert (config.batch_size, config.divergence, config.learning_rate, config.replay) == (3, "jsd", 0.001, 5.0)
    with pytest.raises(ValueError, match="field=value"):
        replay.read_arm("batch_size", OnlineConfig())
    with pytest.raises(ValueError, match="no key 'batchsize'"):
        replay.read_arm("batchsize=2", OnlineConfig())


@pytest.mark.parametrize(("flag", "value"), [("--what", "magic"), ("--requests", "0"), ("--draft", "grow:x")])
def test_bad_flags_are_named(flags, caplog, flag, value):
    assert benchmark.main([*flags, flag, value]) == 2
    assert value in caplog.text
