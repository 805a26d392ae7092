"""`recipes/benchmarks/pool.py`: what a route takes, measured."""

import json

import pytest
import torch


def test_an_adapter_takes_less_and_what_a_pool_reckons_with_is_what_is_measured(target_dir, tmp_path, capsys):
    from recipes.benchmarks import pool

    given = "--drafts grow:0,1;feature --requests 2 --switches 3 --steps 3 --dtype bfloat16 --threads 1 --seed 0"
    assert pool.main([*given.split(), "--target", str(target_dir), "--json", str(tmp_path / "rows.json")]) == 0
    assert "| grow:0,1 | adapter |" in capsys.readouterr().out
    adapter, grown, feature = json.loads((tmp_path / "rows.json").read_text())
    assert adapter["unmerged_bytes"] < adapter["serving_bytes"]
    assert adapter["unmerged_step"] > 0
    for row in (grown, feature):
        assert row["unmerged_bytes"] == row["serving_bytes"]
        assert row["unmerged_step"] is None
    for row in (adapter, grown, feature):
        assert row["whole_bytes"] == pytest.approx(row["estimated_bytes"], rel=0.1)


def test_tensors_without_data_take_nothing():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from recipes.benchmarks.pool import live_bytes

    before = live_bytes()
    with FakeTensorMode():
        held = [torch.empty(1 << 20)]
    held += [torch.zeros(1 << 18), torch.empty(1 << 20, device="meta")]
    assert live_bytes() - before == pytest.approx(1 << 20, rel=0.01)
    held.clear()
