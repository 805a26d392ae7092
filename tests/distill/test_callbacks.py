"""Callbacks: what a Trainer has learnt reaches the assistant, in our trainer and in a user's own; and of each step a follower is told."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from hf_osd.assistant import OnlineAssistant
from hf_osd.config import OnlineConfig
from hf_osd.distill.callbacks import FollowStepsCallback, RefreshAssistantCallback
from hf_osd.distill.trainer import OnlineGKDTrainer, training_args
from hf_osd.feedback.buffer import FeedbackBuffer


class Assistant:
    """Keeps the weights of every refresh."""

    def __init__(self):
        self.taken = []

    def refresh(self, model):
        self.taken.append({name: p.detach().clone() for name, p in model.named_parameters()})


def in_ours(draft, callback, steps, requests, tmp_path):
    config = OnlineConfig(batch_size=1, warmup_steps=0, seed=0)
    trainer = OnlineGKDTrainer(draft, FeedbackBuffer(), config, callbacks=[callback])
    trainer.learn(requests[:steps])


def in_a_users(draft, callback, steps, requests, tmp_path):
    random = torch.Generator().manual_seed(0)
    texts = [torch.randint(2, 64, (8,), generator=random) for _ in range(steps)]
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=1,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    dataset = [{"input_ids": ids, "labels": ids} for ids in texts]
    Trainer(draft, args, train_dataset=dataset, callbacks=[callback]).train()


@pytest.fixture
def requests(make_feedback):
    return [make_feedback(n=6, prompt=4, seed=i) for i in range(5)]


def same(weights, model):
    return all(torch.equal(weights[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("train", [in_ours, in_a_users])
@pytest.mark.parametrize(("every", "refreshes"), [(None, 1), (2, 3), (1, 6), (10, 1)])
def test_it_refreshes_every_so_many_steps_and_at_the_end(tiny_llama, requests, tmp_path, train, every, refreshes):
    draft, assistant = tiny_llama(layers=1), Assistant()
    untrained = {name: p.detach().clone() for name, p in draft.named_parameters()}
    train(draft, RefreshAssistantCallback(assistant, every), 5, requests, tmp_path)
    assert len(assistant.taken) == refreshes
    assert same(assistant.taken[-1], draft), "the last one is what training ended with"
    assert not same(untrained, draft)
    if every == 2:
        first, second, last = assistant.taken
        for a, b in ((untrained, first), (first, second), (second, last)):
            assert any(not torch.equal(a[name], b[name]) for name in a), "each has learnt since the one before"


@pytest.mark.parametrize("train", [in_ours, in_a_users])
def test_an_assistant_serves_what_was_trained(tiny_llama, requests, tmp_path, train):
    draft = tiny_llama(layers=1)
    for end in (draft.get_input_embeddings(), draft.get_output_embeddings()):
        end.requires_grad_(False)
    assistant = OnlineAssistant(draft, learn=False)
    leased = assistant.serving.lease()  # a generate call that is running
    before = {name: p.detach().clone() for name, p in leased.named_parameters()}
    train(draft, RefreshAssistantCallback(assistant), 3, requests, tmp_path)
    assert same(dict(assistant.serving.active.named_parameters()), draft)
    assert same(before, leased), "the running call goes on with the weights it began with"
    assert not same(before, draft)
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        served, trained = assistant.serving.active(input_ids=ids).logits, draft.eval()(input_ids=ids).logits
    assert torch.equal(served, trained)


@pytest.mark.parametrize("every", [0, -1])
def test_less_than_a_step_is_refused(every):
    with pytest.raises(ValueError, match=f"`every_steps` is {every}; give a whole number"):
        RefreshAssistantCallback(Assistant(), every)


class Follower:
    """Keeps what it is told, and whether the weights have moved since it was last told anything."""

    def __init__(self, draft):
        self.draft, self.told, self.last = draft, [], draft.model.norm.weight.detach().clone()

    def before_step(self, last):
        self.note("last" if last else "before")

    def after_step(self):
        self.note("after")

    def note(self, what):
        now = self.draft.model.norm.weight.detach().clone()
        self.told.append((what, not torch.equal(now, self.last)))
        self.last = now


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_follower_is_told_of_each_step_and_which_is_the_last_of_an_update(tiny_llama, requests, accumulate):
    draft = tiny_llama(layers=1)
    follower, config = Follower(draft), OnlineConfig(batch_size=2 // accumulate, warmup_steps=0, seed=0)
    args = training_args(config, draft.device, gradient_accumulation_steps=accumulate)
    trainer = OnlineGKDTrainer(draft, FeedbackBuffer(), config, args, callbacks=[FollowStepsCallback(follower)])
    step, end = [("before", False), ("after", True)], [("last", False), ("after", True)]
    for count, told in ((5, [*step, *step, *end]), (2, end)):
        trainer.learn(requests[:count])
        assert follower.told == told, "the weights move in between, and at no other time"
        follower.told.clear()
