"""Choosing a draft's shape: by what it costs and what it learns, within a time, and without a trace elsewhere."""

import copy
import math

import pytest
import torch

from hf_osd import OnlineConfig, record_answers
from hf_osd.models.draft_head import DraftHead
from hf_osd.policy.costs import Costs
from hf_osd.shapes.choice import choose_shape, states_to_record
from hf_osd.shapes.shape import Shape, default_shapes

ONE, THREE, FEATURE = Shape("layers", (0,)), Shape("layers", (0, 1, 3)), Shape("feature", (1, 2, 3))
CONFIG = OnlineConfig(seed=0, replay_ratio=1.0, learning_rate=3e-3, warmup_steps=0, ema_decay=0.0)


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4)


@pytest.fixture(scope="module")
def answers(target, answers_with_states):
    return answers_with_states(target, 15, 16, FEATURE.grow(target).config.recorded_layers, prompt=5)


def costing(**by_depth):
    """Costs by the number of layers, as if measured."""

    def measure(target, variants, texts, max_gamma):
        return [Costs(by_depth.get(f"of_{one.draft.config.num_hidden_layers}", 0.1)) for one in variants]

    return measure


def choose(target, answers, candidates=(ONE, THREE), **kwargs):
    return choose_shape(
        target, answers, list(candidates), **{"sizes": (), "config": CONFIG, "measure": costing(), **kwargs}
    )


@pytest.mark.parametrize(
    ("costs", "chosen"), [({"of_1": 3.0, "of_3": 0.01}, THREE), ({"of_1": 0.01, "of_3": 3.0}, ONE)]
)
def test_what_a_shape_costs_decides(target, answers, costs, chosen):
    choice = choose(target, answers, measure=costing(**costs))
    assert choice.row.shape == str(chosen)
    assert choice.draft.config.num_hidden_layers == len(chosen.layers)
    assert [row.value for row in choice.rows] == sorted((row.value for row in choice.rows), reverse=True)


def test_and_what_it_learns(target, answers):
    """At the same cost the draft that shares more with the target."""
    choice = choose(target, answers)
    assert choice.row.acceptance[0] == max(row.acceptance[0] for row in choice.rows)


def test_the_draft_comes_with_what_it_has_learnt_and_the_target_stays(target, answers):
    before, state = copy.deepcopy(target.state_dict()), torch.random.get_rng_state()
    choice = choose(target, answers, [ONE])
    grown = dict(ONE.grow(target).named_parameters())
    moved = {name for name, p in choice.draft.named_parameters() if not torch.equal(p, grown[name])}
    assert moved
    assert all("layers" in name or "norm" in name for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_better_half_learns_for_longer_and_all_of_a_round_the_same(target, answers):
    shapes = [ONE, Shape("layers", (0, 1)), Shape("layers", (0, 3)), THREE]
    rows = choose(target, answers, shapes, measure=costing(of_1=5.0, of_3=5.0)).rows
    learnt = {row.shape: row.learnt for row in rows}
    assert learnt["layers 0,1"] == learnt["layers 0,3"] > learnt["layers 0"] == learnt["layers 0,1,3"] > 0
    assert {row.shape for row in rows[:2]} == {"layers 0,1", "layers 0,3"}
    assert learnt["layers 0,1"] == 2 * 12  # of each answer that is learnt, one pass more than there is replay


def test_the_best_of_each_kind_stays_in(target, answers):
    """A draft of a new layer begins slower; here it costs so much that it is last."""

    def dear_to_feature(target, variants, texts, max_gamma):
        return [Costs(9.0 if one.draft.config.model_type == "osd_feature_draft" else 0.1) for one in variants]

    shapes = [ONE, Shape("layers", (0, 1)), Shape("layers", (0, 3)), FEATURE]
    rows = choose(target, answers, shapes, measure=dear_to_feature).rows
    learnt = {row.shape: row.learnt for row in rows}
    assert learnt[str(FEATURE)] == rows[0].learnt > min(learnt.values())


def test_time_ends_it(target, answers):
    """Each shape learns one part at least; what is over by then is over."""
    ticks = iter(range(10**6))
    choice = choose(target, answers, seconds=1.0, config=OnlineConfig(seed=0), clock=lambda: float(next(ticks)))
    assert {row.learnt for row in choice.rows} == {8}


def test_a_draft_that_reads_states_needs_them(target, answers):
    rows = choose(target, answers, [ONE, FEATURE]).rows
    assert {row.kind for row in rows} == {"layers", "feature"}
    prompts = [one.tokens[: one.prompt_length].long() for one in answers]
    without = record_answers(target, prompts, 16)
    choice = choose(target, without, [ONE, FEATURE])
    assert {row.kind for row in choice.rows} == {"layers"}
    assert "states" in choice.left_out["feature 1,2,3"]
    with pytest.raises(ValueError, match="without the target's states"):
        choose(target, without, [FEATURE])


def test_states_are_recorded_once_for_all(target):
    assert states_to_record(target, [ONE]) is None
    assert states_to_record(target) == FEATURE.grow(target).config.recorded_layers
    with pytest.raises(ValueError, match="different states"):
        states_to_record(target, [FEATURE, Shape("feature", (1, 2))])


def test_a_draft_vocabulary_costs_acceptance_and_is_chosen_where_it_pays(target, answers):
    def cheap_if_small(target, variants, texts, max_gamma):
        return [Costs(0.5 if one.head is None else 0.01) for one in variants]

    choice = choose(target, answers, [THREE], sizes=(32,), measure=cheap_if_small)
    small, whole = sorted(choice.rows, key=lambda row: row.draft_vocab_size or math.inf)
    assert (small.draft_vocab_size, whole.draft_vocab_size) == (32, None)
    assert small.acceptance[0] <= whole.acceptance[0]
    assert choice.row == small
    assert DraftHead.from_config(choice.draft, choice.config).vocabulary.size == 32
    dear = choose(target, answers, [THREE], sizes=(32,))
    assert dear.row.draft_vocab_size is None, "at the same cost all rows are better, or no worse"
    assert DraftHead.from_config(dear.draft, dear.config) is None


def test_what_cannot_be_grown_or_learn_is_left_out(target, answers):
    choice = choose(target, answers, [ONE, Shape("layers", (9,))])
    assert "layers" in choice.left_out["layers 9"]
    with pytest.raises(ValueError, match="No draft can be chosen"):
        choose(target, answers, [Shape("layers", (9,))])
    with pytest.raises(ValueError, match="finite"):
        choose(target, answers, [ONE], config=OnlineConfig(seed=0, learning_rate=1e30, warmup_steps=0))
    with pytest.raises(ValueError, match="held back"):
        choose(target, answers[:1])


def test_the_largest_are_left_out_where_memory_is_short(target, answers, monkeypatch):
    monkeypatch.setattr("hf_osd.shapes.choice.available", lambda device: 30 * 2**20)
    monkeypatch.setattr(
        "hf_osd.shapes.trial.Trial.memory", lambda trial: (2**20 * len(trial.shape.layers) ** 2, 2**22)
    )
    choice = choose(target, answers)
    assert {row.shape for row in choice.rows} == {"layers 0", "layers 0,1,3"}
    monkeypatch.setattr("hf_osd.shapes.choice.available", lambda device: 20 * 2**20)
    choice = choose(target, answers)
    assert {row.shape for row in choice.rows} == {"layers 0"}
    assert "memory" in choice.left_out["layers 0,1,3"]


def test_nothing_pays_is_said(target, answers):
    choice = choose(target, answers, [ONE], measure=costing(of_1=9.0))
    assert (choice.row.gamma, choice.row.speedup) == (0, 1.0)
    assert choice.row.value < 1
    assert "no shape pays" in choice.summary()
    assert choice.to_dict()["rows"][0]["shape"] == "layers 0"
    assert choice.table().count("\n") == 2


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 30])
def test_default_shapes_are_there(tiny_llama, depth):
    target = tiny_llama(layers=depth)
    shapes = default_shapes(target)
    assert len(set(shapes)) == len(shapes)
    assert [one.kind for one in shapes].count("feature") == 1
    assert all(len(one.layers) < depth for one in shapes if one.kind == "layers")
    if depth == 30:
        assert len(shapes) >= 6
        assert Shape("layers", (0, 29)) in shapes
    for shape in shapes if depth < 30 else ():
        shape.grow(target)
