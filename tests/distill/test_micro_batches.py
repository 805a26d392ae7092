"""A step over many tokens is made in parts: each of a bounded size, and the gradients are those of the whole."""

import copy
from dataclasses import replace

import pytest
import torch

from hf_osd import FeedbackBuffer, OnlineConfig, grow_draft, grow_feature_draft
from hf_osd.distill import micro_batches as module
from hf_osd.distill.micro_batches import micro_batches
from hf_osd.distill.trainer import OnlineGKDTrainer


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4)


@pytest.fixture(scope="module")
def answers(target, answers_with_states):
    layers = grow_feature_draft(target).config.recorded_layers
    return answers_with_states(target, 7, 10, layers, batch_size=7, top_k=16, prompt_positions=4)


@pytest.mark.parametrize(
    ("lengths", "most", "parts"),
    [
        ([4, 4, 4], 12, [3]),
        ([4, 4, 5], 12, [2, 1]),  # padded they are 15
        ([1, 1, 1, 20, 20], 12, [3, 1, 1]),
        ([20, 1, 1], 12, [1, 2]),
        ([3] * 9, 12, [4, 4, 1]),
    ],
)
def test_parts_are_bounded_by_their_padded_tokens(make_feedback, monkeypatch, lengths, most, parts):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", most)
    requests = [replace(one, tokens=one.tokens[:1].repeat(n)) for n in lengths for one in [make_feedback(n=1)]]
    found = micro_batches(requests)
    assert [len(part) for part in found] == parts
    assert [id(one) for part in found for one in part] == [id(one) for one in requests]


def test_a_source_counts_where_it_is_longer(make_feedback, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 20)
    requests = [replace(make_feedback(n=2, prompt=2), source=torch.zeros(11, dtype=torch.int32)) for _ in range(2)]
    assert [len(part) for part in micro_batches(requests)] == [1, 1]


def gradients_of(draft, answers, widths, **fields) -> list[dict[str, torch.Tensor]]:
    """Of each optimizer step, by the names of what trains."""
    found = []
    config = OnlineConfig(**{"seed": 0, "warmup_steps": 0, "sampled_columns": None, "batch_size": None} | fields)
    trainer = OnlineGKDTrainer(copy.deepcopy(draft), FeedbackBuffer(), config)
    trainer.args.max_grad_norm = 0.0
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    )
    trainer.learn(answers)
    return found, trainer


@pytest.mark.parametrize("grow", [grow_feature_draft, lambda target: grow_draft(target, layers=[0, 3])])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_the_gradients_of_the_parts_add_up(target, answers, monkeypatch, grow, batch_size):
    """Answers teach at different numbers of positions, so that a mean over parts would be another one."""
    answers = [
        one if i % 2 else replace(one, outcome=torch.full_like(one.outcome, 1)) for i, one in enumerate(answers)
    ]
    draft, whole, split = grow(target), [], []
    expected, one = gradients_of(draft, answers, whole, batch_size=batch_size, positions="error")
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 40)
    found, other = gradients_of(draft, answers, split, batch_size=batch_size, positions="error")
    assert len(found) == len(expected) == len(whole) < len(split)
    assert max(split) <= 40 < max(whole)
    assert one.losses[1] == other.losses[1]
    assert one.losses[0] == pytest.approx(other.losses[0], rel=1e-4)
    assert one.state.log_history[-1]["train_loss"] == pytest.approx(
        other.state.log_history[-1]["train_loss"], rel=1e-4
    )
    for ours, theirs in list(zip(found, expected, strict=True))[
        :1
    ]:  # of the next ones the weights differ by a rounding
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-4)


def test_without_a_need_nothing_is_split(target, answers):
    widths = []
    gradients_of(grow_feature_draft(target), answers, widths)
    assert len(widths) == 1
