"""Two processes that learn one adapter, of which one has less memory."""

import torch

from hf_osd import OnlineConfig
from hf_osd.learning.memory import LearningFacts, learning_bytes
from hf_osd.models.lora import adaptable


def test_ranks_learn_the_same_adapter_by_the_memory_of_the_poorest(run_job, tmp_path, tiny_llama, make_feedback):
    draft = tiny_llama(layers=1)
    config = OnlineConfig(adapter="lora")
    trainable = {name for name, _ in draft.named_parameters() if "layers" in name or "norm" in name}
    facts = LearningFacts.of(draft, trainable, adaptable(draft), config)
    requests = [[make_feedback(seed=i + 10 * rank) for i in range(3)] for rank in range(2)]
    given = {"draft": draft, "least": 2 * learning_bytes(facts, 2), "requests": requests}
    torch.save(given, tmp_path / "given.pt")
    run_job("lora.py", tmp_path, 2)
    one, other = (torch.load(tmp_path / f"found.{rank}.pt") for rank in range(2))
    assert one["rank"] == other["rank"] == 2
    assert one["choice"] == other["choice"]
    assert one["refreshed"]
    for kind in ("begun", "learnt", "served"):
        assert one[kind].keys() == other[kind].keys()
        assert all(torch.equal(w, other[kind][name]) for name, w in one[kind].items())
    assert any(not torch.equal(w, one["begun"][name]) for name, w in one["learnt"].items())
