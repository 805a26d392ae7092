"""A feature-level draft learns from recorded answers and states: what the states alone say; and not from ones of another position."""

from dataclasses import replace

import pytest
import torch

from hf_osd import OnlineConfig, grow_feature_draft, record_answers
from hf_osd.distill.scoring import score, score_by_step
from hf_osd.distill.trainer import OnlineGKDTrainer
from hf_osd.feedback.buffer import FeedbackBuffer

SYMBOLS, KEYS = 12, 4  # tokens 2 … 13, and 40 … 43
AUX = [1, 2, 3]


def texts(count: int, length: int, random: torch.Generator) -> torch.Tensor:
    """A key, a symbol, and symbols that follow from the one before by one of four permutations, in turn; which is first is the key's. The draft reads no first token,
    so that it knows the turn by the states alone."""
    tables = 2 + torch.stack(
        [torch.randperm(SYMBOLS, generator=torch.Generator().manual_seed(i)) for i in range(KEYS)]
    )
    ids = torch.randint(2, 2 + SYMBOLS, (count, length), generator=random)
    ids[:, 0] = torch.randint(40, 40 + KEYS, (count,), generator=random)
    for i in range(2, length):
        ids[:, i] = tables[(ids[:, 0] + i) % KEYS, ids[:, i - 1] - 2]
    return ids


@pytest.fixture(scope="module")
def recorded(tiny_llama):
    """A target that knows the rule, and its answers to 80 prompts."""
    target, random = tiny_llama(layers=4, initializer_range=0.1), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(target.parameters(), lr=3e-3)
    for _ in range(200):
        ids = texts(24, 16, random)
        logits = target(input_ids=ids).logits[:, 1:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target.requires_grad_(False).generation_config.eos_token_id = None
    assert loss < 0.1
    answers = record_answers(target, list(texts(80, 3, random)), 13, batch_size=80, top_k=16, states_of=AUX)
    return target, answers[:50], answers[50:]


@pytest.fixture(scope="module")
def taught(recorded):
    """A draft that has learnt from the first fifty requests."""
    target, seen, _ = recorded
    return learnt(target, seen)


def learnt(target, requests, **fields):
    """A draft that has passed ten times over the requests."""
    config = OnlineConfig(learning_rate=5e-3, batch_size=4, seed=0, **fields)
    trainer = OnlineGKDTrainer(grow_feature_draft(target, AUX, seed=0), FeedbackBuffer(), config)
    for _ in range(10):
        trainer.learn(requests)
    return trainer.model


def shifted(requests):
    """The same requests with each state taken for that of the next position."""
    return [replace(one, states=one.states.moved(1)) for one in requests]


def alpha(scores) -> float:
    return float(torch.cat([one.flatten() for one in scores]).nanmean())


def test_it_learns_from_fifty_requests_what_the_states_say(recorded, taught):
    target, seen, held_back = recorded
    cold = alpha(score(grow_feature_draft(target, AUX, seed=0), held_back))
    found = alpha(score(taught, held_back))
    assert cold < 0.3
    assert found > 0.85
    steps = [alpha([one[k] for one in score_by_step(taught, held_back, 3)]) for k in range(3)]
    assert steps[0] == pytest.approx(found)
    assert min(steps) > 0.8
    # An off-by-one between what it learnt from and what it is served with would be seen.
    assert alpha(score(taught, shifted(held_back))) < found - 0.15
    wrong = learnt(target, shifted(seen))
    assert alpha(score(wrong, held_back)) < found - 0.15


def test_without_unrolled_steps_it_drafts_one_token_and_no_block(recorded, taught):
    target, seen, held_back = recorded
    alone = score_by_step(learnt(target, seen, unrolled_steps=1), held_back, 3)
    beside = score_by_step(taught, held_back, 3)
    assert alpha([one[1] for one in alone]) < alpha([one[1] for one in beside]) - 0.1
