"""`recipes/experiments/replay.py` and `recipes/experiments/on_policy.py`: arms on one trace, runs that are not run twice, and differences with their intervals."""

import json
import shutil

import pytest
import torch

from hf_osd import OnlineAssistant, OnlineConfig
from hf_osd.feedback.trace import read_trace, write_trace


@pytest.fixture(scope="module")
def traces(target_dir, words, tmp_path_factory):
    """Two domains of recorded answers."""
    from recipes.experiments import record

    folder = tmp_path_factory.mktemp("traces")
    for name, some in (("left", words[:30]), ("right", words[30:])):
        rows = [{"prompt": " ".join(some[i : i + 4])} for i in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        flags = f"--target {target_dir} --stream {folder / name}.jsonl --requests 12 --held_back 5 --max_new_tokens 8 --output_dir {folder}"
        assert record.main([*flags.split(), "--threads", "1"]) == 0
    return folder


def flags(target_dir, traces, *more) -> list[str]:
    given = f"--target {target_dir} --trace {traces / 'left'} --requests 8 --held_back 5 --score_every 4 --threads 1 --update_interval 4"
    return [*given.split(), "--learning_rate", "5e-3", "--gate", "false", *more]


@pytest.mark.parametrize("kind", ["padded head", "another tokenizer"])
def test_a_draft_of_another_vocabulary_learns_from_a_trace_in_its_tokens(
    target_dir, traces, tmp_path, refused, brought_draft, kind
):
    from transformers import AutoTokenizer

    from recipes.experiments import on_policy, record, replay

    brought, log = brought_draft(kind), tmp_path / "runs.jsonl"
    recording = f"--target {target_dir} --stream {traces / 'left'}.jsonl --requests 12 --held_back 5 --max_new_tokens 8 --threads 1"
    recording = [*recording.split(), "--output_dir", str(tmp_path)]
    assert record.main([*recording, "--draft", str(brought)]) == 0
    refused(record.main, recording, says="another draft_size")  # in the target's own tokens it is another trace
    given = flags(
        target_dir, tmp_path, "--draft", str(brought), "--log", str(log), "--save_to", str(tmp_path / "saved")
    )
    assert replay.main(given) == 0
    [row] = [json.loads(line) for line in log.read_text().splitlines()]
    assert (row["updates"], row["failed"]) == (2, 0)
    saved = [AutoTokenizer.from_pretrained(where).get_vocab() for where in (tmp_path / "saved" / "0-0", brought)]
    assert saved[0] == saved[1]
    refused(replay.main, flags(target_dir, tmp_path), says="grow:0,1 has 64")
    refused(replay.main, flags(target_dir, traces, "--draft", str(brought)), says="draft of the target's family")
    refused(replay.main, [*given, "--also", str(traces / "right")], says="several vocabularies")
    refused(
        on_policy.main,
        ["--target", str(target_dir), "--trace", str(tmp_path / "left"), "--held_back", "5"],
        says="recorded without --draft",
    )


def test_every_arm_and_seed_is_a_row_and_is_run_once(target_dir, traces, tmp_path, capsys, monkeypatch):
    from recipes.experiments import replay

    log = tmp_path / "runs.jsonl"
    given = flags(
        target_dir,
        traces,
        "--arms",
        "base;replay_ratio=0.0,positions=error;preset=paper,update_interval=4",
        "--seeds",
        "0,1",
        "--log",
        str(log),
    )
    assert replay.main(given) == 0
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed)
        for arm in ("base", "replay_ratio=0.0,positions=error", "preset=paper,update_interval=4")
        for seed in (0, 1)
    ]
    for row in rows:
        assert sorted(map(int, row["scores"]["left"])) == [0, 4, 8]
        assert [len(hits) for hits in row["scores"]["left"].values()] == [5, 5, 5]
        assert len(row["prequential"]) == 8
        assert row["updates"] == 2
        assert row["failed"] == 0
    assert rows[0]["scores"]["left"]["0"] == rows[1]["scores"]["left"]["0"]  # before learning all are the same
    assert rows[0]["prequential"] != rows[1]["prequential"]  # in another order
    table = capsys.readouterr().out
    assert "held back of left, 5 prompts, from 0 to 8 requests, 2 seeds" in table

    monkeypatch.setattr(replay.Experiment, "run", lambda *args: pytest.fail("a run that is in the log was run again"))
    assert replay.main(given) == 0
    assert capsys.readouterr().out.split("held back")[1] == table.split("held back")[1]
    assert replay.main([*given, "--at", "4,4-8"]) == 0
    assert [line.split(", ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("held back")] == [
        "from 0 to 4 requests",
        "from 4 to 8 requests",
        "from 0 to 8 requests",
    ]
    assert replay.main([*given, "--at", "5"]) == 2


def test_another_recording_of_the_same_name_is_run_anew(target_dir, traces, tmp_path):
    from recipes.experiments import replay

    shutil.copytree(traces, tmp_path / "traces")
    log = tmp_path / "runs.jsonl"
    given = flags(target_dir, tmp_path / "traces", "--log", str(log))
    for runs in (1, 1):
        assert replay.main(given) == 0
        assert len(log.read_text().splitlines()) == runs
    path = next((tmp_path / "traces" / "left").glob("stream-*"))
    requests, facts = read_trace(path)
    write_trace(path, requests[::-1], facts)
    assert replay.main(given) == 0
    assert len({json.loads(line)["key"] for line in log.read_text().splitlines()}) == 2


@pytest.mark.parametrize("mixed", ["false", "true"])
def test_other_answers_are_learnt_beside_their_requests(target_dir, traces, tmp_path, monkeypatch, mixed):
    from recipes.experiments import record, replay

    shutil.copytree(traces, tmp_path / "traces")
    both = ",".join(str(tmp_path / "traces" / name) for name in ("left", "right"))
    log, streams = tmp_path / "runs.jsonl", ",".join(str(traces / f"{name}.jsonl") for name in ("left", "right"))
    given = flags(target_dir, traces, "--trace", both, "--requests", "8,4", "--mixed", mixed, "--log", str(log))
    assert replay.main([*given, "--again", "2"]) == 2, "there are none yet"
    recording = f"--target {target_dir} --stream {streams} --requests 12 --held_back 5 --max_new_tokens 8 --output_dir {tmp_path / 'traces'}"
    assert record.main([*recording.split(), "--again", "1.0", "--times", "2", "--threads", "1"]) == 0
    learnt, beside = [], replay.replay

    def seen(assistant, requests, limit, again):
        learnt.extend(zip(requests, again, strict=True))
        return beside(assistant, requests, limit, again)

    monkeypatch.setattr(replay, "replay", seen)
    assert replay.main(given) == replay.main([*given, "--again", "2"]) == 0
    alone, again = (json.loads(line) for line in log.read_text().splitlines())
    assert (alone["again"], again["again"]) == (0, 2)
    assert again["learned_tokens"] > 2 * alone["learned_tokens"]
    assert len(again["prequential"]) == len(alone["prequential"]) == 12
    assert all(others == () for _, others in learnt[:12])
    for request, others in learnt[12:]:
        assert [other.sampled for other in others] == [True, True]
        prompts = [one.tokens[: one.prompt_length].tolist() for one in (request, *others)]
        assert prompts[0] == prompts[1] == prompts[2]


def test_each_trace_fades_into_the_next(target_dir, traces, tmp_path, refused):
    from recipes.experiments import replay

    order = replay.fading([["a"] * 100, ["b"] * 100, ["c"] * 50])
    assert sorted(order) == ["a"] * 100 + ["b"] * 100 + ["c"] * 50
    assert set(order[:30]) == {"a"}
    assert set(order[-5:]) == {"c"}
    middle = order[75:125]  # where as many of the second come as of the first
    assert 0.25 < middle.count("b") / len(middle) < 0.75
    assert replay.fading([[1, 2, 3]]) == [1, 2, 3]

    both, log = f"{traces / 'left'},{traces / 'right'}", tmp_path / "runs.jsonl"
    given = flags(target_dir, traces, "--trace", both, "--requests", "8,4", "--gradual", "true", "--log", str(log))
    assert replay.main(given) == 0
    [row] = [json.loads(line) for line in log.read_text().splitlines()]
    assert (row["gradual"], row["mixed"], len(row["prequential"])) == (True, False, 12)
    refused(replay.main, [*given, "--mixed", "true"], says="`mixed` and `gradual`")


def test_several_passes_are_offline_distillation(target_dir, traces, tmp_path):
    from recipes.experiments import replay

    log = tmp_path / "runs.jsonl"
    given = flags(target_dir, traces, "--replay_ratio", "0", "--log", str(log))
    assert replay.main(given) == replay.main([*given, "--passes", "3", "--at", "12"]) == 0
    once, thrice = (json.loads(line) for line in log.read_text().splitlines())
    assert (once["passes"], thrice["passes"]) == (1, 3)
    assert list(thrice["scores"]["left"]) == ["0", "4", "8", "12", "16", "20", "24"]
    assert thrice["learned_tokens"] == 3 * once["learned_tokens"], "of the same requests"
    assert once["draft"] == "grow:0,1"
    assert (once["max_new_tokens"], once["temperature"]) == (8, 0.0)


def test_a_sampled_trace_is_scored_by_what_p_and_q_share(target_dir, traces, tmp_path, refused):
    from hf_osd.distill.scoring import score
    from recipes.common.models import load_target
    from recipes.experiments import on_policy, record, replay

    recording = f"--target {target_dir} --stream {traces / 'left'}.jsonl --requests 12 --held_back 5 --max_new_tokens 8 --threads 1"
    assert record.main([*recording.split(), "--temperature", "1.0", "--output_dir", str(tmp_path)]) == 0
    traced = replay.load_trace(tmp_path / "left", top_k=4, held_back=5)
    assert {request.top_ids.shape[1] for request in traced.stream} == {4}
    target, _ = load_target(str(target_dir), "auto")
    assert torch.cat(score(target, traced.held_back)).min() > 0.999, "what the target shares with itself"
    log = tmp_path / "runs.jsonl"
    arms = ["--arms", "base;preset=paper,update_interval=4", "--log", str(log)]
    assert replay.main(flags(target_dir, tmp_path, *arms)) == 0
    for row in map(json.loads, log.read_text().splitlines()):
        assert (row["temperature"], row["failed"]) == (1.0, 0)
        assert any(hits != int(hits) for hits, _ in row["scores"]["left"]["8"])
    greedy = ["--target", str(target_dir), "--trace", str(tmp_path / "left"), "--held_back", "5"]
    refused(on_policy.main, greedy, says="recorded without --temperature")


def test_domains_are_learnt_in_turn_or_mixed_and_others_scored(target_dir, traces, tmp_path):
    from recipes.experiments import replay

    both = f"{traces / 'left'},{traces / 'right'}"
    log = tmp_path / "runs.jsonl"
    given = flags(
        target_dir,
        traces,
        "--trace",
        both,
        "--also",
        str(traces / "right"),
        "--log",
        str(log),
        "--save_to",
        str(tmp_path),
    )
    assert replay.main([*given, "--requests", "4,8", "--also", ""]) == 0
    saved = (tmp_path / "0-0" / "model.safetensors").read_bytes()
    mix = [*given, "--requests", "4,8", "--also", "", "--mixed", "true"]
    assert replay.main(mix) == 2, "a draft of another run is there"
    assert (tmp_path / "0-0" / "model.safetensors").read_bytes() == saved
    assert replay.main([*mix, "--overwrite"]) == 0
    turn, mixed = (json.loads(line) for line in log.read_text().splitlines())
    assert set(turn["scores"]) == set(mixed["scores"]) == {"left", "right"}
    assert len(turn["prequential"]) == len(mixed["prequential"]) == 12
    assert turn["key"] != mixed["key"]
    assert (tmp_path / "0-0" / "model.safetensors").is_file()


def test_bad_flags_are_named(target_dir, traces, caplog):
    from recipes.experiments import replay

    for more, words in (
        (["--requests", "99"], "left has 12 recorded requests and `requests` asks for 99"),
        (["--requests", "4,4"], "give one number, or one for each"),
        (["--held_back", "6"], "5 prompts held back and `held_back` is 6"),
        (["--trace", str(traces / "nothing")], "make one with `python -m recipes.experiments.record"),
        (["--arms", "replay"], "write field=value"),
        (["--arms", "preset=other"], "the preset is 'paper'"),
        (["--seeds", "0,x"], "`seeds` is '0,x'"),
        (["--requests", "some"], "`requests` is 'some'"),
        (["--at", "3"], "`at` is '3', and α is measured after 0, "),
        (["--at", "4-"], "`at` is '4-'"),
        (["--learn", "off"], "`learn` is 'off' and recipes/experiments/replay.py's arm 'base' learns in this process"),
        (["--arms", "base;learn=process"], "`learn` is 'process'"),
        (["--log", str(traces / "left.jsonl")], "line 1: a row without `key`"),
        (["--log", str(traces / "left" / "rows.jsonl")], "lies within --trace"),
        (["--save_to", str(traces / "left")], "is --trace"),
    ):
        caplog.clear()
        assert replay.main(flags(target_dir, traces, *more)) == 2
        assert words in caplog.text


def test_bad_flags_are_refused_before_any_run(target_dir, traces, monkeypatch, caplog):
    from recipes.experiments import replay

    monkeypatch.setattr(replay.Experiment, "run", lambda *args: pytest.fail("something was learnt"))
    for more in (
        ["--at", "3"],
        ["--arms", "base;learn=off"],
        ["--log", str(traces)],
        ["--save_to", str(traces / "left.jsonl")],
    ):
        assert replay.main(flags(target_dir, traces, *more)) == 2


def test_a_draft_that_cannot_be_saved_costs_no_row(target_dir, traces, tmp_path, monkeypatch, caplog):
    from recipes.experiments import replay

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(OnlineAssistant, "save_pretrained", full)
    log = tmp_path / "runs.jsonl"
    given = flags(target_dir, traces, "--requests", "4", "--log", str(log), "--save_to", str(tmp_path / "drafts"))
    assert replay.main(given) == 2
    assert "No space left" in caplog.text
    assert len(log.read_text().splitlines()) == 1


def test_poison_and_on_policy_name_what_they_cannot_do_with(target_dir, traces, refused):
    from recipes.experiments import on_policy, poison

    for recipe in (poison, on_policy):
        given = ["--target", str(target_dir), "--trace", str(traces / "left"), "--held_back", "5", "--threads", "1"]
        refused(recipe.main, [*given, "--learn", "off"], says="`learn` is 'off'")
        refused(recipe.main, [*given, "--log", str(traces / "left.jsonl")], says="line 1: a row without")
        refused(recipe.main, [*given, "--log", str(traces / "left" / "new.jsonl")], says="lies within --trace")


def test_arms_are_fields_over_the_base():
    from recipes.experiments.arms import read_arm

    base = OnlineConfig(replay_ratio=5.0)
    assert read_arm("base", base, "grow:0").config == base
    arm = read_arm("ensemble=[1+2+4],draft=grow:0+2,lora=4,divergence=jsd", base, "grow:0")
    assert arm.config.ensemble == [1, 2, 4]
    assert arm.config.replay_ratio == 5.0
    assert arm.config.divergence == "jsd"
    assert (arm.draft_name, arm.config.adapter, arm.config.lora) == ("grow:0,2", "lora", 4)
    assert read_arm("adapter=off,lora=4", base, "").config.adapter == "off", "what is said goes before what is meant"
    assert read_arm("preset=paper,learning_rate=3e-3", base, "").config == OnlineConfig.paper(learning_rate=3e-3)
    assert read_arm("preset=paper,lora=2", base, "").config == OnlineConfig.paper(adapter="lora", lora=2)


def test_a_lora_arm_learns_in_an_adapter_alone(target_dir):
    from recipes.common.models import load_target
    from recipes.experiments.arms import read_arm

    target, _ = load_target(str(target_dir), "float32")
    arm = read_arm("lora=2", OnlineConfig(seed=0), "grow:0,1")
    assistant = OnlineAssistant(arm.draft(target), arm.config)
    assert assistant.adapter.rank == 2
    assert all("lora_" in name for name in assistant.serving.trainable)
    assert arm.facts()["config"]["lora"] == 2


def test_intervals_are_paired():
    from recipes.experiments.arms import intervals

    random = torch.Generator().manual_seed(0)
    # Prompts differ far more than arms do: only pairing shows a gain of one position in ten each.
    hits = torch.randint(0, 9, (60,), generator=random)
    before = [[[int(hit), 10] for hit in hits]]
    after = [[[int(hit) + 1, 10] for hit in hits]]
    gain = intervals(before, after)
    assert gain.difference == pytest.approx(0.1)
    assert (gain.low, gain.high) == pytest.approx((0.1, 0.1))
    nothing = intervals(before, before)
    assert (nothing.low, nothing.difference, nothing.high) == (0, 0, 0)
    noisy = intervals(before, [[[int(hit), 10] for hit in hits.flip(0)]])
    assert noisy.low < -0.02 < 0.02 < noisy.high
    assert noisy.difference == pytest.approx(0)


def test_on_policy_arms_learn_from_the_drafts_text(target_dir, traces, tmp_path):
    from recipes.experiments import on_policy

    log = tmp_path / "runs.jsonl"
    given = f"--target {target_dir} --trace {traces / 'left'} --requests 8 --held_back 5 --threads 1 --update_interval 4 --log {log}"
    given += " --gate false --learning_rate 1e-3 --learning_budget 1"
    assert on_policy.main(given.split()) == 0
    rows = {row["arm"]: row for row in map(json.loads, log.read_text().splitlines())}
    assert list(rows) == ["teacher", "drafted", "student", "mixed"]
    assert {row["updates"] for row in rows.values()} == {2}
    assert {row["failed"] for row in rows.values()} == {0}
    assert rows["drafted"]["learned_tokens"] > rows["teacher"]["learned_tokens"]
    assert rows["student"]["scores"] != rows["teacher"]["scores"]


def test_rows_after_a_rejection_are_the_targets_on_the_drafts_text(target_dir, traces):
    from pathlib import Path

    from hf_osd import OnlineAssistant
    from recipes.common.models import load_draft, load_target
    from recipes.experiments import on_policy
    from recipes.experiments.replay import load_trace
    from recipes.experiments.replaying import as_drafted

    target, _ = load_target(str(target_dir), "float32")
    draft, config = load_draft("grow:0,1", target), OnlineConfig(seed=0)
    traced = load_trace(Path(traces / "left"), 64, 5)
    assistant = OnlineAssistant(draft, config)
    found = 0
    for request in traced.stream:
        served = as_drafted(request, assistant.score([request])[0], config.num_assistant_tokens, 8)
        for branch in on_policy.branches(target, draft, served, config, 4, torch.Generator().manual_seed(0)):
            found += 1
            at = branch.prompt_length - 1  # the rejected token's place
            assert torch.equal(branch.tokens[:at], request.tokens[:at])
            assert branch.tokens[at] != request.tokens[at]
            logits = target(input_ids=branch.tokens[None].long()).logits[0, branch.prompt_length - 1 : -1]
            assert torch.equal(branch.top_ids[:, 0].long(), logits.argmax(-1))
    assert found


def test_a_draft_that_reads_the_targets_states_learns_from_a_trace_that_has_them(
    target_dir, traces, tmp_path, refused
):
    from recipes.experiments import record, replay

    log = tmp_path / "runs.jsonl"
    recording = f"--target {target_dir} --stream {traces / 'left'}.jsonl --requests 12 --held_back 5 --max_new_tokens 8 --threads 1"
    recording = [*recording.split(), "--output_dir", str(tmp_path), "--states"]
    assert record.main([*recording, "auto"]) == 0
    requests, facts = read_trace(next((tmp_path / "left").glob("stream-*")))
    assert facts["states"] == "1,2,3"
    assert all(one.states.width == 3 * 32 for one in requests)
    refused(record.main, [*recording, "0,1"], says="another states")
    given = flags(target_dir, tmp_path, "--log", str(log), "--arms", "base;draft=grow:0+1")
    assert replay.main([*given, "--draft", "feature"]) == 0
    for row in map(json.loads, log.read_text().splitlines()):
        assert (row["updates"], row["failed"]) == (2, 0)
        assert all(n > 0 for scores in row["scores"]["left"].values() for _, n in scores)
    refused(replay.main, [*given, "--draft", "feature:0,2"], says="--states 0,2")
    refused(replay.main, [*given, "--draft", "feature:x"], says="feature:2,15,27")
    refused(replay.main, flags(target_dir, traces, "--draft", "feature"), says="left has none")
