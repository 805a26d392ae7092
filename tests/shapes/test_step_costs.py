"""Timing drafts against their target: what is observed, not how long it took."""

import time

import pytest
import torch

from hf_osd import grow_draft, grow_feature_draft, record_answers
from hf_osd.models.draft_head import DraftHead
from hf_osd.shapes.step_costs import Variant, default_clock, measure_costs


@pytest.fixture(scope="module")
def texts(target):
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 64, (n,), generator=random) for n in (1, 5, 9, 7)]
    return record_answers(target, prompts, 40)


def test_every_variant_and_every_block_is_timed(target, texts):
    """By a clock that each forward of the target moves by ten, and each of a draft by one."""
    now = [0.0]

    def moves(model, by):
        return model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + by))

    draft, reader = grow_draft(target), grow_feature_draft(target)
    variants = [Variant(one, head) for one in (draft, reader) for head in (None, DraftHead(64, 16))]
    hooks = [moves(target, 10.0), moves(draft, 1.0), moves(reader, 1.0)]
    try:
        costs = measure_costs(target, variants, texts, max_gamma=5, rounds=20, clock=lambda: now[0])
    finally:
        for hook in hooks:
            hook.remove()
    for one in costs:
        assert one.step_seconds == 10.0
        assert one.c == pytest.approx(0.1)
        assert one.read(1) == pytest.approx(0.1)
        assert one.is_sure_of_draft
        assert one.v_upto(6) == [1.0] * 6
        assert one.longest_measured == 6


def test_by_default_on_a_real_clock(target, texts):
    [costs] = measure_costs(target, [Variant(grow_draft(target), None)], texts, 3, 12)
    assert costs.step_seconds > 0
    assert costs.read(1) > 0
    assert costs.v_upto(4) == sorted(costs.v_upto(4))


def test_threads_and_devices_choose_the_clock():
    cpu = torch.device("cpu")
    assert default_clock(cpu) is time.thread_time
    assert default_clock(torch.device("cuda")) is time.perf_counter
    torch.set_num_threads(2)
    assert default_clock(cpu) is time.perf_counter


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
