"""`OnlineGKDTrainer`: the loss by hand, one trainer over many updates, and a teacher that never runs."""

import copy
import dataclasses

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainerCallback

from hf_osd.config import OnlineConfig
from hf_osd.distill import accelerate_state
from hf_osd.distill.collator import FeedbackCollator
from hf_osd.distill.scoring import score
from hf_osd.distill.trainer import OnlineGKDTrainer, training_args
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import ACCEPTED

VOCAB = 64


def plain(**fields) -> OnlineConfig:
    """Nothing but the divergence: no total variation, no warm-up, no clipping."""
    return OnlineConfig(**{"total_variation_weight": 0.0, "warmup_steps": 0, "seed": 0} | fields)


def trainer_of(model, config=None, buffer=None, **kwargs) -> OnlineGKDTrainer:
    buffer = FeedbackBuffer() if buffer is None else buffer  # an empty one is false
    made = OnlineGKDTrainer(model, buffer, config or plain(), **kwargs)
    if "args" not in kwargs:
        made.args.max_grad_norm = 0.0
    return made


def descent(config, model, **args):
    """By plain gradients."""
    return training_args(config, model.device, **{"optim": "sgd", "max_grad_norm": 0.0} | args)


def row_losses(model, feedback, taught=None):
    """Forward KL at each teaching position from dense distributions: one forward a request, no padding, no cache.

    The logits at index prompt_length - 1 + i predict answer i. Needs feedback with k = V.
    """
    logits = model(input_ids=feedback.tokens[None].long(), use_cache=False).logits[0]
    q = logits[feedback.prompt_length - 1 : -1].log_softmax(-1)  # (N, V)
    p = torch.zeros_like(q).scatter(-1, feedback.top_ids.long(), feedback.top_logps.float())
    losses = (p.exp() * (p - q)).sum(-1)
    return losses if taught is None else losses[taught]


@pytest.fixture
def requests(make_feedback):
    """Two requests of unlike prompts and answers, with the target's whole distributions."""
    return [
        make_feedback(n=5, prompt=9, k=VOCAB, seed=1, dtype=torch.float32),
        make_feedback(n=11, prompt=2, k=VOCAB, seed=2, dtype=torch.float32),
    ]


# float32 through two layers, padded or not, and tails of 1e-6 of mass.
NEAR = {"atol": 1e-4, "rtol": 1e-4}


def test_the_loss_is_that_of_each_request_alone(tiny_llama, requests):
    """Catches rows shifted by one, padding that is attended to, and a mean over requests instead of rows."""
    model = tiny_llama()
    expected = torch.cat([row_losses(copy.deepcopy(model), f) for f in requests]).mean()
    loss = trainer_of(model).compute_loss(model, FeedbackCollator()(requests))
    torch.testing.assert_close(loss, expected, **NEAR)


def test_only_error_positions_teach_if_asked(tiny_llama, requests):
    model = tiny_llama()
    errors = [f.outcome != ACCEPTED for f in requests]
    assert any(mask.any() and not mask.all() for mask in errors)
    apart = copy.deepcopy(model)
    expected = torch.cat([row_losses(apart, f, mask) for f, mask in zip(requests, errors, strict=True)])
    everything = torch.cat([row_losses(apart, f) for f in requests]).mean()
    trainer = trainer_of(model, plain(positions="error", batch_size=None, learning_rate=1e-9))
    assert trainer.learn(requests) == pytest.approx(expected.mean().item(), abs=1e-4)
    assert expected.mean().item() != pytest.approx(everything.item(), abs=1e-3)


def test_the_configured_divergence_is_the_one_that_trains(tiny_llama, requests):
    model, losses = tiny_llama(), {}
    batch = FeedbackCollator()(requests)
    for fields in (
        {"divergence": "forward_kl"},
        {"divergence": "reverse_kl"},
        {"divergence": "jsd", "beta": 0.2},
        {"divergence": "jsd", "beta": 0.8},
        {"divergence": "total_variation"},
        {"divergence": "forward_kl", "total_variation_weight": 2.0},
    ):
        trainer = trainer_of(copy.deepcopy(model), plain(**fields))
        losses[str(fields)] = trainer.compute_loss(trainer.model, batch).item()
    values = list(losses.values())
    assert len({round(value, 4) for value in values}) == 6, losses
    assert values[5] == pytest.approx(values[0] + 2 * values[4], abs=1e-4)


def test_gradients_with_an_item_count_are_those_of_the_mean_over_rows(tiny_llama, requests):
    model = tiny_llama()
    trainer, batch = trainer_of(model), FeedbackCollator()(requests)
    gradients = []
    for items in (None, torch.tensor(16), 16):
        model.zero_grad()
        trainer.compute_loss(model, batch, num_items_in_batch=items).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for others in gradients[1:]:
        for mean, counted in zip(gradients[0], others, strict=True):
            torch.testing.assert_close(counted, mean, atol=1e-6, rtol=1e-5)  # a division before or after the sum


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_step_follows_the_mean_over_all_its_rows(tiny_llama, requests, accumulate):
    """5 and 11 rows: a mean of two batches' means, or a count that leaves rows out, gives other weights."""
    model = tiny_llama()
    apart = copy.deepcopy(model)
    torch.cat([row_losses(apart, f) for f in requests]).mean().backward()
    config = plain(learning_rate=0.1, batch_size=2 // accumulate)
    args = descent(config, model, gradient_accumulation_steps=accumulate)
    trainer = trainer_of(model, config, args=args)
    trainer.learn(requests)
    assert trainer.state.global_step == 1
    for (name, moved), start in zip(model.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(moved.detach(), start.detach() - 0.1 * start.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.fixture
def taught(tiny_llama, answer_of):
    """What a target said, for a draft that is another random model."""
    target, random = tiny_llama(layers=2, seed=7), torch.Generator().manual_seed(0)
    return [answer_of(target, torch.randint(2, VOCAB, (6,), generator=random), 12) for _ in range(6)]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_the_draft_learns_what_the_target_said(tiny_llama, taught, divergence):
    draft = tiny_llama(layers=1)
    trainer = trainer_of(draft, OnlineConfig(divergence=divergence, learning_rate=1e-2, batch_size=3, seed=0))
    alpha_before = torch.cat(score(draft, taught)).mean()
    first, _, last = (trainer.learn(taught * passes) for passes in (1, 20, 1))
    assert last < 0.5 * first
    assert torch.cat(score(draft, taught)).mean() > alpha_before + 0.4


def test_the_teacher_never_runs_and_running_it_is_an_error(tiny_llama, taught):
    trainer = trainer_of(tiny_llama(layers=1))
    ran = []
    trainer.teacher_model.register_forward_pre_hook(lambda *_: ran.append(1))
    trainer.learn(taught)
    assert ran == []
    with pytest.raises(RuntimeError, match="The teacher ran"):
        trainer.teacher_model(input_ids=torch.zeros(1, 1, dtype=torch.long))


def test_each_batch_costs_one_forward_of_the_draft(tiny_llama, taught):
    draft, forwards = tiny_llama(layers=1), []
    trainer = trainer_of(draft, plain(batch_size=2))
    draft.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    trainer.learn(taught)
    assert len(forwards) == 3


class Rates(TrainerCallback):
    """The learning rate of every optimizer step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def test_the_warm_up_runs_once_over_all_updates(tiny_llama, taught):
    """Upstream makes a scheduler at every train(): short updates would never leave the warm-up."""
    rates = Rates()
    config = plain(batch_size=1, warmup_steps=5, learning_rate=0.01)
    trainer = trainer_of(tiny_llama(layers=1), config, callbacks=[rates])
    for _ in range(4):
        trainer.learn(taught[:2])
    assert rates.rates == pytest.approx([0.0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01])


def test_the_rate_falls_with_the_root_of_the_steps_after_the_warm_up(tiny_llama, taught):
    rates = Rates()
    config = plain(batch_size=1, warmup_steps=2, decay_steps=4, learning_rate=0.01)
    trainer = trainer_of(tiny_llama(layers=1), config, callbacks=[rates])
    for _ in range(4):
        trainer.learn(taught[:2])
    falling = [0.01 / (1 + steps / 4) ** 0.5 for steps in range(7)]
    assert rates.rates == pytest.approx([0.0, 0.005, *falling[:6]])
    assert trainer.lr_scheduler.get_last_lr() == pytest.approx([falling[6]] * len(trainer.optimizer.param_groups))


def test_a_rate_may_be_given_in_place_of_the_configs(tiny_llama, taught):
    rates = Rates()
    trainer = trainer_of(tiny_llama(layers=1), plain(learning_rate=0.01), learning_rate=0.05, callbacks=[rates])
    trainer.learn(taught)
    assert set(rates.rates) == {0.05}


def test_the_optimizers_state_carries_over(tiny_llama, taught):
    """Adam begun anew at every update takes a full step into whatever direction comes first."""
    draft = tiny_llama(layers=1)
    trainer = trainer_of(draft, plain(batch_size=1))
    trainer.learn(taught[:2])
    parameter = draft.model.norm.weight
    first = trainer.optimizer.state[parameter]
    assert first["step"] == 2
    moments = first["exp_avg"].clone()
    assert moments.abs().sum() > 0
    seen = []
    draft.model.norm.weight.register_hook(lambda grad: seen.append(grad.clone()))
    trainer.learn(taught[2:3])
    again = trainer.optimizer.state[parameter]
    assert again["step"] == 3
    beta = trainer.optimizer.param_groups[0]["betas"][0]
    torch.testing.assert_close(again["exp_avg"], beta * moments + (1 - beta) * seen[0], atol=1e-7, rtol=1e-5)


def test_many_small_updates_are_one_large_one(tiny_llama, taught):
    """Nothing in between resets or averages: the same steps in the same order give the same weights."""
    drafts = [tiny_llama(layers=1) for _ in range(2)]
    same = [taught[0]] * 4
    trainer = trainer_of(drafts[0], plain(batch_size=1, warmup_steps=3))
    for request in same:
        trainer.learn([request])
    trainer_of(drafts[1], plain(batch_size=1, warmup_steps=3)).learn(same)
    for name, parameter in drafts[0].named_parameters():
        assert torch.equal(parameter, drafts[1].get_parameter(name)), name


def test_what_needs_no_gradient_stays_as_it_is(tiny_llama, taught):
    draft = tiny_llama(layers=1)
    for end in (draft.model.embed_tokens, draft.lm_head):
        end.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in draft.named_parameters()}
    trainer_of(draft, plain(learning_rate=0.01)).learn(taught)
    for name, parameter in draft.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_train_passes_over_what_the_buffer_holds(tiny_llama, taught):
    buffer, draft = FeedbackBuffer(), tiny_llama(layers=1)
    trainer, rows = trainer_of(draft, plain(batch_size=4), buffer), []
    for request in taught:
        buffer.add(request)
    trainer.data_collator = Spied(rows)
    for passes in (1, 2):
        trainer.train()
        assert sorted(rows) == sorted(id(request) for request in taught * passes)


class Spied(FeedbackCollator):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __call__(self, batch):
        self.seen += map(id, batch)
        return super().__call__(batch)


def test_all_of_an_update_may_be_one_step(tiny_llama, taught):
    trainer = trainer_of(tiny_llama(layers=1), plain(batch_size=None))
    trainer.learn(taught)
    assert trainer.state.global_step == 1


def test_batches_are_of_like_length(tiny_llama, make_feedback):
    trainer = trainer_of(tiny_llama(layers=1), plain(batch_size=2))
    trainer._requests = [make_feedback(n=n, prompt=p) for n, p in ((2, 2), (20, 9), (3, 2), (20, 8))]
    widths = sorted(batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader())
    assert widths == [4, 28]


def test_the_order_of_batches_repeats_with_its_seed_and_changes_from_pass_to_pass(tiny_llama, make_feedback):
    requests = [make_feedback(n=n) for n in range(1, 9)]

    def orders(seed):
        trainer = trainer_of(tiny_llama(layers=1), plain(batch_size=1, seed=seed))
        trainer._requests = requests
        return [[batch["keep"] for batch in trainer.get_train_dataloader()] for _ in range(3)]

    assert orders(3) == orders(3)
    assert orders(3) != orders(4)
    assert len({tuple(order) for order in orders(3)}) > 1
    assert all(sorted(order) == list(range(1, 9)) for order in orders(3))


def test_with_nothing_to_learn_from_it_says_what_to_do(tiny_llama, taught, make_feedback):
    draft = tiny_llama(layers=1)
    trainer = trainer_of(draft)
    for learn in (trainer.train, lambda: trainer.learn([])):
        with pytest.raises(ValueError, match="no feedback to learn from: serve requests"):
            learn()
    assert trainer.learn(taught) > 0, "and it goes on once there is some"


def test_requests_without_an_error_position_are_left_out(tiny_llama, make_feedback):
    request = make_feedback(n=4, k=VOCAB, dtype=torch.float32)
    accepted = dataclasses.replace(request, outcome=torch.full_like(request.outcome, ACCEPTED))
    trainer = trainer_of(tiny_llama(layers=1), plain(positions="error", batch_size=1))
    with pytest.raises(ValueError, match="no feedback"):
        trainer.learn([accepted])
    trainer.learn([accepted, make_feedback(n=30, k=VOCAB, seed=1)])
    assert trainer.state.global_step == 1


def test_nothing_is_printed(tiny_llama, taught, capsys):
    trainer_of(tiny_llama(layers=1)).learn(taught)
    assert capsys.readouterr().out == ""


def test_nothing_is_written(tiny_llama, taught, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    trainer_of(tiny_llama(layers=1)).learn(taught)
    assert list(tmp_path.iterdir()) == []


def test_learning_leaves_the_drafts_settings_alone(tiny_llama, taught):
    """Upstream aligns special tokens with a tokenizer's, and turns the cache off: saved so, the draft would draft without."""
    draft = tiny_llama(layers=1)
    settings = draft.config.to_dict(), draft.generation_config.to_dict()
    trainer_of(draft).learn(taught)
    assert (draft.config.to_dict(), draft.generation_config.to_dict()) == settings


def test_autocast_computes_in_its_dtype_on_float32_masters(tiny_llama, requests):
    model, seen = tiny_llama(), set()
    trainer = trainer_of(model, autocast_dtype=torch.bfloat16)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    exact = torch.cat([row_losses(tiny_llama(), f) for f in requests]).mean()
    loss = trainer.compute_loss(model, FeedbackCollator()(requests))
    loss.backward()
    assert seen == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert loss.item() == pytest.approx(
        exact.item(), rel=0.05
    )  # bfloat16 has 8 bits: 0.4 % a rounding, over two layers


def test_outputs_come_with_the_loss_if_asked(tiny_llama, requests):
    model = tiny_llama()
    trainer, batch = trainer_of(model), FeedbackCollator()(requests)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert loss.ndim == 0
    assert outputs.logits.shape == (16, VOCAB)


def test_one_of_upstreams_optimizers_may_be_given_in_arguments_of_ones_own(tiny_llama, taught):
    model, config = tiny_llama(layers=1), plain(learning_rate=0.5)
    trainer = trainer_of(model, config, args=descent(config, model, weight_decay=0.25))
    trainer.learn(taught)
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert 0.25 in {group["weight_decay"] for group in optimizer.param_groups}


def test_gradients_are_clipped_to_the_norm_in_the_arguments(tiny_llama, requests):
    model, config = tiny_llama(), plain(learning_rate=1.0, batch_size=2)
    assert training_args(config, model.device).max_grad_norm == 1.0
    before = [p.detach().clone() for p in model.parameters()]
    trainer_of(model, config, args=descent(config, model, max_grad_norm=0.01)).learn(requests)
    moved = torch.cat([(p.detach() - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert nn.utils.get_total_norm([moved]).item() == pytest.approx(0.01, rel=1e-2)  # weights of about 1 in float32


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("dynamo_backend", "inductor"),
        ("dynamo_backend", "eager"),
        ("mixed_precision", "bf16"),
        ("mixed_precision", "fp16"),
    ],
)
def test_a_launch_config_does_not_compile_learning_or_choose_its_arithmetic(
    tiny_llama, requests, monkeypatch, caplog, name, value
):
    """As `accelerate launch` hands it on. Whatever else the process trains keeps it."""
    model = tiny_llama()
    under = copy.deepcopy(model)
    trainer_of(model).learn(requests)
    accelerate_state._say_that_it_is_set_aside.cache_clear()
    monkeypatch.setenv(f"ACCELERATE_{name.upper()}", value)
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: pytest.fail("compiled"))
    trainer_of(under).learn(requests)
    trainer_of(tiny_llama())
    assert [record.getMessage().count(f"{name}={value}") for record in caplog.records] == [1]
    others = Accelerator().state
    assert value in (others.mixed_precision, others.dynamo_plugin.backend.value.lower())
    for name, p in under.named_parameters():
        assert torch.equal(p, dict(model.named_parameters())[name])


def test_arguments_of_ones_own_are_obeyed(tiny_llama, requests):
    args = training_args(plain(), torch.device("cpu"), bf16=True)
    assert trainer_of(tiny_llama(), args=args).accelerator.native_amp
