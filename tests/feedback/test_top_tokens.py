"""`top_tokens`: what `torch.topk` finds, whatever block it lies in."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.feedback.top_tokens import top_tokens


@given(
    n=st.integers(0, 4),
    columns=st.integers(1, 3000),
    k=st.integers(1, 20),
    levels=st.sampled_from([3, 50, 10**6]),
    seed=st.integers(0, 10**6),
)
def test_finds_the_largest(n, columns, k, levels, seed):
    """Ties, the columns after the last whole block, and rows with fewer finite logits than are wanted."""
    k = min(k, columns)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels, (n, columns), generator=generator).float()
    logits[: n // 2][torch.rand(n // 2, columns, generator=generator) < 0.99] = -torch.inf
    values, ids = top_tokens(logits, k)
    assert torch.equal(values, logits.topk(k).values)
    assert torch.equal(values, logits.gather(1, ids))
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize(
    "at", [[0, 63, 64, 65], [4095, 4096, 4097, 4099], [130, 131, 132, 133], [5, 1000, 2000, 4099]]
)
def test_several_in_one_block_and_at_its_edges(at):
    logits = torch.zeros(1, 4100)
    logits[0, at] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    values, ids = top_tokens(logits, 4)
    assert (ids.tolist(), values.tolist()) == ([at], [[4.0, 3.0, 2.0, 1.0]])


def test_what_is_not_a_number_comes_first_as_in_torch():
    logits = torch.zeros(1, 4096)
    logits[0, 1000], logits[0, 7] = torch.nan, torch.inf
    values, ids = top_tokens(logits, 2)
    assert ids.tolist() == [[1000, 7]]
    assert values[0].isnan().tolist() == [True, False]
