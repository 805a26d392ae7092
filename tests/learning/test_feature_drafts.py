"""A learner whose draft reads the target's hidden states: what it learns from, is judged by and takes; requests without states beside others change nothing."""

from dataclasses import replace

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig, grow_feature_draft
from hf_osd.distill.ensemble import make_student
from hf_osd.learning.learner import Learner
from hf_osd.learning.memory import LearningFacts, choose_learning, learning_bytes
from hf_osd.models.lora import adaptable


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4)


@pytest.fixture(scope="module")
def answers(target, answers_with_states):
    layers = grow_feature_draft(target).config.aux_layers
    return answers_with_states(target, 24, 10, layers, batch_size=24, top_k=16, prompt_positions=4)


def learner_of(target, served, **fields):
    draft = grow_feature_draft(target, seed=0)
    trainable = {name for name, p in draft.named_parameters() if p.requires_grad}
    config = OnlineConfig(**{"learning_rate": 3e-3, "update_interval": 4, "replay_ratio": 1.0, "seed": 0} | fields)
    return Learner(make_student(draft, trainable, config), FeedbackBuffer(), served.append)


def run(learner, requests):
    for one in requests:
        learner.add(one)
        if learner.is_due():
            learner.update()
    return learner


@pytest.mark.parametrize("rate", [3e-3, "auto"])
def test_it_learns_and_is_judged(target, answers, rate):
    served = []
    learner = run(learner_of(target, served, learning_rate=rate, gate_tolerance=1.0), answers)
    assert learner.failed == 0
    assert learner.updates >= 3
    assert learner.rate.found
    shadow = learner.contenders.shadow
    assert shadow.requests > 0
    assert shadow.estimate() is not None
    assert 0 <= shadow.static <= shadow.positions
    learnt = learner.student.weights()
    assert not {name for name in learnt if "embed_tokens" in name or "lm_head" in name}
    static = learner.contenders.static.weights
    assert sum(bool((weight != static[name]).any()) for name, weight in learnt.items()) > 5


def test_requests_without_states_are_left_out_of_all_figures(target, answers):
    """They are NaN throughout: the same is learnt, served and counted as without them."""
    learners = [learner_of(target, [], update_interval=4 if i == 0 else 8, replay_ratio=0.0) for i in range(2)]
    run(learners[0], answers)
    mixed = [one for answer in answers for one in (answer, replace(answer, states=None))]
    run(learners[1], mixed)
    assert [learner.failed for learner in learners] == [0, 0]
    figures = [learner.metrics() for learner in learners]
    for name in ("updates", "learned_tokens", "accepted_updates", "rejected_updates", "regret_vs_static", "trouble"):
        assert figures[0][name] == figures[1][name], name
    assert learners[0].contenders.shadow.state() == learners[1].contenders.shadow.state()
    weights = [learner.student.weights() for learner in learners]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rate", [3e-3, "auto"])
def test_of_requests_without_states_alone_nothing_is_learnt_and_nothing_fails(target, answers, rate):
    learner = run(learner_of(target, [], learning_rate=rate), [replace(one, states=None) for one in answers])
    assert (learner.updates, learner.failed, learner.learned_tokens) == (0, 0, 0)
    assert learner.contenders.shadow.requests == 0
    assert learner.contenders.shadow.estimate() is None
    run(learner, answers)  # and it learns from those that come then
    assert learner.updates > 0
    assert learner.failed == 0


def test_errors_alone_may_teach(target, answers):
    learner = run(learner_of(target, [], positions="error"), answers)
    assert learner.failed == 0
    assert learner.updates > 0


def test_it_learns_whole_and_never_in_an_adapter(target):
    draft = grow_feature_draft(target)
    trainable = {name for name, p in draft.named_parameters() if p.requires_grad}
    assert adaptable(draft, trainable) == {}
    for budget in (2**30, 1):
        choice = choose_learning(draft, trainable, OnlineConfig(adapter="auto", memory_budget=budget))
        assert choice.rank is None
        assert choice.learns == (budget > 1)
        assert "adapter" not in choice.sentence
    with pytest.raises(ValueError, match="reads the target's hidden states"):
        choose_learning(draft, trainable, OnlineConfig(adapter="lora"))


def test_what_learning_takes_is_that_of_all_its_steps(target):
    draft = grow_feature_draft(target)
    trainable = {name for name, p in draft.named_parameters() if p.requires_grad}

    def facts(**fields):
        return LearningFacts.of(draft, trainable, {}, OnlineConfig(**fields))

    one, three = facts(unrolled_steps=1), facts(unrolled_steps=3)
    assert (one.steps, three.steps) == (1, 3)
    assert one.state == three.state == 4 * 32  # the last layer's as well, which it is drawn to
    states = three.tokens * three.batch * 4 * 32 * 16
    assert three.activations > 3 * (one.activations - states)
    assert learning_bytes(three) - learning_bytes(one) == three.activations - one.activations
    assert one.trainable == sum(p.numel() for p in draft.parameters() if p.requires_grad)
    assert one.layers == 1
