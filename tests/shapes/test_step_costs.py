"""Timing drafts against their target: what is observed, not how long it took."""

import itertools

import pytest
import torch

from hf_osd import grow_draft, grow_feature_draft, record_answers
from hf_osd.models.draft_head import DraftHead
from hf_osd.shapes.step_costs import Variant, measure_costs


@pytest.fixture(scope="module")
def texts(target):
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 64, (n,), generator=random) for n in (1, 5, 9, 7)]
    return record_answers(target, prompts, 40)


def test_every_variant_and_every_block_is_timed(target, texts):
    draft, reader = grow_draft(target), grow_feature_draft(target)
    variants = [
        Variant(draft, None),
        Variant(draft, DraftHead(64, 16)),
        Variant(reader, None),
        Variant(reader, DraftHead(64, 16)),
    ]
    costs = measure_costs(target, variants, texts, max_gamma=5, rounds=16)
    for one in costs:
        assert one.c > 0
        assert one.read(1) > 0
        assert one.is_sure_of_draft
        v = one.v_upto(6)
        assert v == sorted(v)
        assert one.longest_measured == 6
    assert len({one.step_seconds for one in costs}) == 1, "all are measured against the same steps"


def test_the_target_is_timed_by_the_clock_given(target, texts):
    """One second a reading: each forward of the target takes one."""
    ticks = itertools.count()
    [costs] = measure_costs(
        target, [Variant(grow_draft(target), None)], texts, 3, 12, clock=lambda: float(next(ticks))
    )
    assert costs.step_seconds == 1.0
    assert costs.v_upto(4) == [1.0] * 4


def test_drafts_are_as_they_were(target, texts):
    draft = grow_draft(target)
    before = {name: p.clone() for name, p in draft.named_parameters()}
    measure_costs(target, [Variant(draft, DraftHead(64, 16))], texts, 5, 12)
    assert all(torch.equal(p, before[name]) for name, p in draft.named_parameters())
    assert draft.get_output_embeddings().weight.shape[0] == 64


def test_answers_that_are_too_short_are_named(target, texts):
    short = record_answers(target, [text.tokens[:3].long() for text in texts], 4)
    with pytest.raises(ValueError, match="let the answers be longer"):
        measure_costs(target, [Variant(grow_draft(target), None)], short, 5)
