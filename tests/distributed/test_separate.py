"""Serving ranks and a learning rank: what is learnt from all comes to each, and who dies takes nobody along."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def job(run_job, tmp_path_factory, tiny_llama) -> SimpleNamespace:
    """What two serving ranks have left, and the logs of all three."""
    folder = tmp_path_factory.mktemp("apart")
    draft = tiny_llama(layers=1, seed=1)
    draft.save_pretrained(folder / "draft")
    tiny_llama(layers=2).save_pretrained(folder / "target")
    run_job("apart.py", folder, 3)
    return SimpleNamespace(
        draft=dict(draft.named_parameters()),
        weights=lambda scene, rank: load_file(folder / f"{scene}.{rank}"),
        facts=[json.loads((folder / f"facts.{rank}").read_text()) for rank in range(2)],
        logs=[(folder / f"log.{rank}").read_text() for rank in range(3)],
    )


def identical(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_what_all_have_taught_serves_on_each(job):
    one, other = (job.weights("together", rank) for rank in range(2))
    assert identical(one, other)
    assert not any(torch.equal(tensor, job.draft[name]) for name, tensor in one.items() if "proj" in name)
    for facts in job.facts:
        assert facts["learner's own"] == [0]
        assert facts["same"] == [True, True]
        assert facts["together"]["updates"] >= 1
        assert facts["together"]["failed"] == 0
        assert facts["together"]["requests"] == 6


def test_where_a_serving_rank_dies_the_others_go_on_learning(job):
    refreshed, figures = job.facts[0]["alone"]
    assert refreshed or figures["updates"] > job.facts[0]["together"]["updates"]
    assert not identical(job.weights("alone", 0), job.weights("together", 0))
    assert "Rank 1 is gone" in job.logs[2]


def test_where_the_learning_rank_dies_the_draft_serves_on_as_it_is(job):
    assert job.facts[0]["nobody"] == [False, True, False]
    assert identical(job.weights("nobody", 0), job.weights("alone", 0))
    assert job.facts[0]["over"] == "the learning rank is gone"
    assert job.logs[0].count("The learning rank is gone") == 1


def test_one_process_is_not_enough(monkeypatch):
    from hf_osd.remote.roles import JobRoles

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="at least 2 processes"):
        JobRoles()


def test_an_assistant_that_learns_elsewhere_already_is_refused(tiny_llama):
    from hf_osd import OnlineAssistant
    from hf_osd.remote.roles import serve_separately

    with pytest.raises(ValueError, match="learn='off'"):
        serve_separately(OnlineAssistant(tiny_llama(), learn=False), SimpleNamespace(learning_rank=1))
