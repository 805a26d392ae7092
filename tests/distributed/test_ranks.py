"""Several processes that learn one draft: what they agree on, the gradients of all, the same bytes on each, and no hanging."""

import copy
import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hf_osd import OnlineConfig, grow_feature_draft, record_answers
from hf_osd.distill.ranks import RankGroup
from hf_osd.feedback.trace import write_trace
from hf_osd.learning.memory import LearningFacts, learning_bytes
from hf_osd.models.lora import adaptable

VOCAB = 512  # enough columns of the head for some of them to be drawn


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """job.py, for what one process makes of the same."""
    spec = importlib.util.spec_from_file_location("job", Path(__file__).parent / "job.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reading(tiny_llama) -> SimpleNamespace:
    """A draft that reads states; by name each rank's requests."""
    target, random = tiny_llama(layers=4), torch.Generator().manual_seed(0)
    draft = grow_feature_draft(target)
    prompts = [torch.randint(2, 64, (n,), generator=random) for n in (4, 9, 6, 3, 7)]
    answers = record_answers(target, prompts, 6, states_of=draft.config.aux_layers)
    stateless = [replace(one, states=None) for one in answers[2:]]
    requests = {"answers": [answers[:2], answers[2:]], "no states": [answers[:2], stateless]}
    return SimpleNamespace(draft=draft, requests=requests)


@pytest.fixture(scope="module")
def adapting(tiny_llama, make_feedback) -> dict:
    """A draft, each rank's requests, and a memory in which an adapter of rank 2 fits."""
    draft = tiny_llama(layers=1)
    config = OnlineConfig(adapter="lora")
    trainable = {name for name, _ in draft.named_parameters() if "layers" in name or "norm" in name}
    facts = LearningFacts.of(draft, trainable, adaptable(draft), config)
    requests = [[make_feedback(seed=i + 10 * rank) for i in range(3)] for rank in range(2)]
    return {"draft": draft, "least": 2 * learning_bytes(facts, 2), "requests": requests}


@pytest.fixture(scope="module")
def job(run_job, tmp_path_factory, tiny_llama, make_feedback, reading, adapting) -> SimpleNamespace:
    """What two processes have left: `tensors(scene) -> (rank 0's, rank 1's)`, `facts`, and what they began with. One job does it all, for each process
    imports torch and transformers for seconds."""
    folder = tmp_path_factory.mktemp("job")
    draft = tiny_llama(vocab=VOCAB)
    draft.save_pretrained(folder / "draft")
    requests = [make_feedback(n=6 + i % 5, vocab=VOCAB, k=4, seed=i) for i in range(24)]
    write_trace(folder / "requests.safetensors", requests)
    torch.save(reading.draft, folder / "feature_draft.pt")
    torch.save(reading.requests, folder / "features.pt")
    torch.save(adapting, folder / "adapter.pt")
    run_job("job.py", folder, 2)
    return SimpleNamespace(
        draft=draft,
        requests=requests,
        tensors=lambda scene: [load_file(folder / f"{scene}.{rank}") for rank in range(2)],
        facts=[json.loads((folder / f"facts.{rank}").read_text()) for rank in range(2)],
    )


def identical(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_ranks_agree(job):
    one, other = (facts["agreeing"] for facts in job.facts)
    assert one.pop("together") == "RuntimeError('It failed on rank 1, whose log says how.')"
    assert other.pop("together") == "KeyError('here')"
    assert one == other
    assert one == {
        "sum": [3.0, 1.0],
        "most": 7,
        "any": [True, False],
        "gather": [[0.0, 0.0, 0.0], [-1.0]],
        "nothing": [],
        "json": [{"rank": 0, "text": "α"}, {"rank": 1, "text": "αα"}],
        "same": [True, False],
    }


@pytest.mark.parametrize("split", ["equal", "unequal", "empty"])
def test_gradients_are_those_of_one_process_on_the_union(job, script, split):
    """Also where one of them has more requests than the other, or none."""
    union = script.one_step(job.draft, job.requests[: sum(script.SPLITS[split])])
    assert sum(name.startswith("grad.") for name in union) > 10
    for rank in job.tensors(split):
        assert rank.keys() == union.keys()
        for name, tensor in rank.items():
            torch.testing.assert_close(tensor, union[name], atol=1e-5, rtol=1e-5)
    assert identical(*job.tensors(split))


@pytest.mark.parametrize("second", ["answers", "no states"])
def test_a_draft_that_reads_states_has_gradients_of_one_process_on_the_union(job, script, reading, second):
    """Rows of all steps and ranks count alike; also where one of them has nothing that teaches."""
    requests = reading.requests[second]
    union = script.feature_step(copy.deepcopy(reading.draft), [one for some in requests for one in some])
    assert len(union) > 10
    for rank in job.tensors(f"features.{second}"):
        assert rank.keys() == union.keys()
        for name, gradient in union.items():
            torch.testing.assert_close(rank[name], gradient, atol=1e-5, rtol=1e-4)


def test_ranks_learn_the_same_adapter_by_the_memory_of_the_poorest(job):
    one, other = (facts["adapting"] for facts in job.facts)
    assert one == other
    rank, _, refreshed = one
    assert (rank, refreshed) == (2, True)
    for kind in ("begun", "learnt", "served"):
        assert identical(*job.tensors(f"adapter.{kind}"))
    begun, learnt = (job.tensors(f"adapter.{kind}")[0] for kind in ("begun", "learnt"))
    assert begun.keys() == learnt.keys()
    assert not identical(begun, learnt)


def test_every_rank_ends_with_the_same_bytes(job):
    """With replay, sampled columns, averages and an ensemble, each rank drawing its own; also after what was learnt has been dropped."""
    counts = [facts["learning"]["counts"] for facts in job.facts]
    assert counts[0] == counts[1]
    assert counts[0][-1] == [6, 1, 0]
    seen = [job.tensors(f"learning.{i}") for i in range(6)]
    for one, other in seen:
        assert identical(one, other)
    assert not identical(seen[2][0], seen[3][0])
    assert identical(seen[3][0], seen[4][0]), "what was dropped had not served"
    assert not identical(seen[4][0], seen[5][0])


def test_what_the_requests_of_one_rank_say_against_a_candidate_drops_it_on_all(job):
    dropped = [[dropped for _, dropped, _ in facts["learning"]["counts"]] for facts in job.facts]
    assert dropped[0] == dropped[1] == [0, 0, 0, 0, 1, 1]


def test_ranks_find_one_rate_though_one_of_them_has_no_requests(job):
    one, other = (facts["finding"] for facts in job.facts)
    assert one == other
    assert [updates for updates, *_ in one] == [0, 1, 2]
    assert {failed for _, failed, *_ in one} == {0}
    assert one[1][4].startswith("the best of")
    assert job.facts[0]["found by"] == job.facts[1]["found by"] > 0
    assert identical(*job.tensors("finding"))


def test_figures_are_of_all_ranks(job):
    one, other = job.facts
    assert one["learning"] == other["learning"]
    assert one["estimate"] == other["estimate"]
    assert one["estimate"]["requests"] > 5


def test_what_fails_on_one_rank_is_undone_on_all(job):
    for facts in job.facts:
        assert facts["failing"] == {"outcomes": [False, False, True], "failed": 1, "undone": True}
    assert identical(*job.tensors("failing"))


def test_what_cannot_learn_together_is_refused_on_all(job):
    for facts in job.facts:
        refused = facts["refused"]
        assert "different drafts" in refused["other draft"]
        assert "learn='inline'" in refused["background"]
        assert "FSDP" in refused["sharded"]
        assert "OnlineGKDTrainer" in refused["sharded"]


def test_generate_starts_no_update_by_itself(job):
    for facts in job.facts:
        assert facts["serving"] == {"before": 0, "refreshed": [True, False, False], "updates": 1}


def test_a_rank_that_goes_takes_no_other_with_it(job):
    assert job.facts[0]["parting"] == [False, False, False, True, 0]


def test_a_process_that_has_not_met_the_others_is_refused(tiny_llama, monkeypatch):
    from accelerate import state

    from hf_osd import OnlineAssistant

    monkeypatch.setattr(state, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match=r"one of 2 processes.*Accelerator"):
        OnlineAssistant(tiny_llama())


def test_one_process_agrees_with_itself_and_learns_when_it_is_due(tiny_llama, make_feedback):
    from hf_osd import OnlineAssistant

    ranks = RankGroup()
    assert ranks.sum(1, 2.5) == [1, 2.5]
    assert (ranks.most(3), ranks.any(True), ranks.any(False), ranks.same({})) == (3, True, False, True)
    with pytest.raises(KeyError), ranks.together():
        raise KeyError
    assistant = OnlineAssistant(tiny_llama(), update_interval=2, gate=False, learning_rate=1e-3, seed=0)
    assistant.buffer.add(make_feedback())
    assert not assistant.update_together()
    assert assistant.update_together(force=True)
