"""Trainers of one process, in several threads: making one does not touch what another reads while it learns."""

import threading

import pytest
from accelerate import Accelerator

from hf_osd.distill import trainer as trainer_module
from hf_osd.distill.trainer import OnlineGKDTrainer
from hf_osd.feedback.buffer import FeedbackBuffer


@pytest.mark.parametrize("shares", [True, False])
def test_a_trainer_that_is_made_beside_an_update_does_not_break_it(tiny_llama, make_feedback, monkeypatch, shares):
    """It is held in the middle of its making, where accelerate's state would be empty; also if it cannot share that state, of another device say."""
    learner, other = (OnlineGKDTrainer(tiny_llama(), FeedbackBuffer()), tiny_llama())
    if not shares:
        monkeypatch.setattr(trainer_module, "has_state_for", lambda device: False)
    making, learnt, made = threading.Event(), threading.Event(), []
    create, step = OnlineGKDTrainer.create_accelerator_and_postprocess, learner.training_step

    def held(trainer):
        making.set()
        assert learnt.wait(60)
        create(trainer)

    thread = threading.Thread(target=lambda: made.append(OnlineGKDTrainer(other, FeedbackBuffer())))

    def training_step(*args, **kwargs):
        if not making.is_set():
            thread.start()
            assert making.wait(60)
        return step(*args, **kwargs)

    monkeypatch.setattr(OnlineGKDTrainer, "create_accelerator_and_postprocess", held)
    monkeypatch.setattr(learner, "training_step", training_step)
    try:
        assert learner.learn([make_feedback(seed=i) for i in range(6)]) > 0
        assert learner.args.n_gpu == 0
    finally:
        learnt.set()
        thread.join()
    assert made[0].learn([make_feedback()]) > 0


def test_a_trainer_leaves_an_accelerator_of_the_users_its_state(tiny_llama):
    OnlineGKDTrainer(tiny_llama(), FeedbackBuffer())
    users = Accelerator()
    OnlineGKDTrainer(tiny_llama(), FeedbackBuffer()).accelerator.state.marker = 1
    assert not hasattr(users.state, "marker")
    assert users.num_processes == 1
