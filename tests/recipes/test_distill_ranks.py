"""The main job in several processes: each serves its share, all end with one draft, and their logs become one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import AutoModelForCausalLM

from recipes import distill
from recipes.common import ranks

RECIPE = Path(__file__).parents[2] / "recipes" / "distill.py"
# Not a multiple of the processes: their shares differ.
REQUESTS = 5


@pytest.fixture
def launch(target_dir, words, tmp_path):
    """`launch(processes, *flags) -> (exit status, log)` under `accelerate launch`, on two streams, into tmp_path/out."""
    for domain in ("one", "two"):
        rows = [{"prompt": " ".join(words[(i * 7 + j) % 62] for j in range(5 + i % 3))} for i in range(12)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def call(processes: int, *flags):
        # On CPUs it starts one process, unless told so.
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
        launcher += ["--num_processes", processes, "--main_process_port", "0"]
        settings = ["--target", target_dir, "--draft", "grow:0,-1", "--requests", REQUESTS, "--held_back", "3"]
        settings += ["--stream", f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}", "--parity", "2"]
        settings += ["--max_new_tokens", "6", "--update_interval", "2", "--output_dir", tmp_path / "out"]
        settings += ["--threads", "1", "--seed", "0", "--warm_up", "1", "--learning_rate", "1e-3"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [str(part) for part in (*launcher, RECIPE, *settings, *flags)]
        job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        return job.returncode, job.stdout + job.stderr

    call.out = tmp_path / "out"
    return call


@pytest.mark.parametrize(("processes", "flags"), [(2, ()), (3, ("--mode", "separate"))])
def test_two_ranks_serve_a_stream_each_its_share(launch, processes, flags):
    status, log = launch(processes, *flags)
    assert status == 0, log
    rows = [json.loads(line) for line in (launch.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["request"] for row in rows] == list(range(2 * REQUESTS))
    assert [row["domain"] for row in rows] == ["one"] * REQUESTS + ["two"] * REQUESTS
    assert sorted(row["rank"] for row in rows) == [0] * 6 + [1] * 4
    summary = json.loads((launch.out / "summary.json").read_text())
    overall = summary["overall"]
    assert (overall["ranks"], overall["drafts_identical"]) == (2, True)
    assert overall["updates"] >= 2
    assert overall["failed_updates"] == 0
    assert overall["target_forwards"] == overall["rounds"] == sum(row["rounds"] for row in rows)
    for figures in summary["domains"].values():
        assert (figures["requests"], figures["compared"], figures["mismatches"]) == (REQUESTS, 4, 0)
        assert 0 <= figures["alpha_before"] <= 1
        assert 0 <= figures["alpha_after"] <= 1
    assert AutoModelForCausalLM.from_pretrained(launch.out / "draft").config.num_hidden_layers == 2
    assert log.count("alpha before") == 1, "one table"


@pytest.fixture
def processes(monkeypatch) -> ranks.Processes:
    """The first of two, of which nobody has met the other."""
    made = ranks.Processes("together")
    made.several = True
    return made


def test_several_processes_are_not_resumed(processes, tmp_path):
    folder = processes.folder(tmp_path / "out", resume=True, overwrite=False)
    with pytest.raises(ValueError, match=r"cannot be resumed.*draft"), folder:
        pass
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("learn", ["background", "process"])
def test_several_processes_do_not_learn_drafts_of_their_own(processes, monkeypatch, refused, learn):
    monkeypatch.setattr(distill, "Processes", lambda mode: processes)
    refused(distill.main, ["--stream", "stdlib", "--learn", learn], says=f"`learn` is '{learn}'")


def test_another_mode_and_a_job_of_one_that_takes_two_are_named(refused):
    refused(distill.main, ["--stream", "stdlib", "--mode", "apart"], says="'apart'")
    refused(distill.main, ["--stream", "stdlib", "--mode", "separate"], says="at least 2 processes")


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "FSDP"), ("deepspeed", "DEEPSPEED")])
def test_configs_for_sharding_are_what_accelerate_reads(name, kind):
    config = load_config_from_file(str(RECIPE.parent / "configs" / f"{name}.yaml"))
    assert config.distributed_type == kind
