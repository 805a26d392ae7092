"""`recipes/experiments/poison.py`: streams with poison in them, and how long a poisoned draft serves good traffic."""

import json

import pytest
import torch

from hf_osd import record_answers
from hf_osd.feedback.trace import write_trace

TOKENS = 12


@pytest.fixture(scope="module")
def trace(tiny_llama, target_dir, tmp_path_factory):
    """Answers of the target to prompts of one kind."""
    from transformers import AutoModelForCausalLM

    folder, random = tmp_path_factory.mktemp("trace"), torch.Generator().manual_seed(0)
    target = AutoModelForCausalLM.from_pretrained(target_dir)
    prompts = [torch.randint(2, 64, (6,), generator=random) for _ in range(58)]
    answers = record_answers(target, prompts, TOKENS, batch_size=58, top_k=16)
    facts = {"target": "tiny", "max_new_tokens": str(TOKENS), "dtype": "float32"}
    write_trace(folder / "stream-00000.safetensors", answers[:48], facts)
    write_trace(folder / "held_back-00000.safetensors", answers[48:], facts)
    return folder


def flags(target_dir, trace, *more) -> list[str]:
    given = (
        f"--target {target_dir} --draft grow:0,1 --trace {trace} --poisoned 24 --held_back 10 --threads 1 --device cpu"
    )
    fast = "--learning_rate 1e-2 --replay_ratio 2 --ema_decay 0 --warmup_steps 0 --update_interval 8 --seed 0"
    return [*given.split(), *fast.split(), *more]


def test_every_poison_and_order_is_a_row_and_without_a_gate_poison_serves(target_dir, trace, tmp_path, capsys):
    from recipes.experiments import poison

    rows = {}
    for gate in ("true", "false"):
        log = tmp_path / f"{gate}.jsonl"
        more = ["--poisons", "other-target,one-prompt", "--gate", gate, "--log", str(log)]
        assert poison.main(flags(target_dir, trace, *more)) == 0
        rows[gate] = [json.loads(line) for line in log.read_text().splitlines()]
        assert [(row["poison"], row["stream"]) for row in rows[gate]] == [
            (kind, order) for kind in ("other-target", "one-prompt") for order in ("first", "mixed")
        ]
    assert all(row["longest"] <= 16 for row in rows["true"])
    assert all(row["static"] == rows["true"][0]["static"] for row in rows["true"])
    assert rows["false"][0]["lowest"] <= min(row["lowest"] for row in rows["true"])
    assert capsys.readouterr().out.count("| other-target | first |") == 2


def test_each_poison_changes_what_its_name_means(make_feedback):
    from recipes.experiments.poison import POISONS

    good = [make_feedback(n=5, prompt=4, seed=i) for i in range(3)]
    made = {name: [poison(good, i, 64) for i in range(3)] for name, poison in POISONS.items()}
    assert all(torch.equal(one.tokens, good[0].tokens) for one in made["one-prompt"])
    for i in range(3):
        other = good[(i + 1) % 3]
        assert torch.equal(made["other-answers"][i].answer, other.answer)
        assert torch.equal(made["other-answers"][i].tokens[:4], good[i].tokens[:4])
        assert torch.equal(made["garbage"][i].answer, good[i].answer)
        assert not torch.equal(made["garbage"][i].tokens[:4], good[i].tokens[:4])
        assert not torch.equal(made["other-target"][i].answer, good[i].answer)
        # What is likeliest is said, as by any target.
        said = made["other-target"][i]
        assert torch.equal(said.top_ids[:, 0], said.answer)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--poisons", "arsenic"], "arsenic"),
        (["--poisoned", "25"], "48 requests"),
        (["--trace", ""], "`trace` is empty"),
    ],
)
def test_bad_flags_are_refused(target_dir, trace, refused, more, says):
    from recipes.experiments import poison

    refused(poison.main, flags(target_dir, trace, *more), says=says)
