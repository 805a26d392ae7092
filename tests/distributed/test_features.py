"""Two processes that learn one feature-level draft: rows of all steps and ranks count as in one process."""

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_osd import grow_feature_draft, record_answers


@pytest.mark.parametrize("second", ["answers", "no states"])
def test_gradients_are_those_of_one_process_on_the_union(run_job, tmp_path, tiny_llama, second):
    """Also where one of them has nothing that teaches."""
    spec = importlib.util.spec_from_file_location("features", Path(__file__).parent / "features.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    target, random = tiny_llama(layers=4), torch.Generator().manual_seed(0)
    draft = grow_feature_draft(target)
    prompts = [torch.randint(2, 64, (n,), generator=random) for n in (4, 9, 6, 3, 7)]
    answers = record_answers(target, prompts, 6, states_of=draft.config.aux_layers)
    requests = [answers[:2], answers[2:]]
    if second == "no states":
        requests[1] = [replace(one, states=None) for one in requests[1]]
    torch.save({"draft": draft, "requests": requests}, tmp_path / "given.pt")
    run_job("features.py", tmp_path, 2)
    union = script.one_step(copy.deepcopy(draft), [one for some in requests for one in some])
    assert len(union) > 10
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}.pt")
        assert found.keys() == union.keys()
        for name, gradient in union.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
