"""`MuonWithAdamW`: matrices to one, all else to the other, and for whoever holds it a single optimizer."""

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_osd.config import OnlineConfig
from hf_osd.distill.muon import MuonWithAdamW
from hf_osd.distill.trainer import OnlineGKDTrainer
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.learning.learner import Learner


def owners(model: nn.Module, optimizer: MuonWithAdamW) -> dict[str, str]:
    """Which optimizer has each parameter, by name."""
    of = {id(p): type(part).__name__ for part in optimizer.parts for g in part.param_groups for p in g["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def give_gradients(model: nn.Module, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=random)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_muon_has_the_matrices_of_the_layers_and_adamw_all_else(tiny_llama):
    model = tiny_llama(layers=1)
    of = owners(model, MuonWithAdamW(model, lr=0.1))
    assert set(of) == set(dict(model.named_parameters())), "each parameter, once"
    assert {name for name, owner in of.items() if owner == "Muon"} == {
        f"model.layers.0.{name}_proj.weight"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    }


def test_embeddings_of_positions_are_no_matrices_either():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 64, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **sizes))
    of = owners(model, MuonWithAdamW(model, lr=0.1))
    assert of["transformer.wpe.weight"] == of["transformer.wte.weight"] == "AdamW"
    assert of["transformer.h.0.attn.c_attn.weight"] == "Muon"
    assert of["transformer.h.0.attn.c_attn.bias"] == "AdamW"


def test_what_does_not_train_belongs_to_neither(tiny_llama):
    model = tiny_llama(layers=2)
    model.model.layers[0].requires_grad_(False)
    model.lm_head.requires_grad_(False)
    of = owners(model, MuonWithAdamW(model, lr=0.1))
    assert set(of) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_one_step_moves_all_that_trains(tiny_llama):
    model = tiny_llama(layers=1)
    optimizer, before = MuonWithAdamW(model, lr=0.1), weights(model)
    give_gradients(model)
    assert optimizer.step() is None
    assert all(not torch.equal(p, before[name]) for name, p in weights(model).items())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.step(lambda: 3.0) == 3.0


def test_a_rate_set_in_the_groups_reaches_both(tiny_llama):
    """That is how schedulers set it. Both parts' first steps are in proportion to the rate."""
    models = [tiny_llama(layers=1) for _ in range(3)]
    before, moved = weights(models[0]), []
    for model, rate in zip(models, (0.0, 0.01, 0.02), strict=True):
        optimizer = MuonWithAdamW(model, lr=0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        give_gradients(model)
        optimizer.step()
        moved.append({name: p - before[name] for name, p in weights(model).items()})
    for name, step in moved[1].items():
        assert (moved[0][name] == 0).all(), name
        torch.testing.assert_close(moved[2][name], 2 * step, atol=1e-6, rtol=1e-3)  # a difference of float32 weights


@pytest.mark.parametrize("chosen", ["matrices", "rest"])
def test_a_draft_may_have_nothing_for_one_of_them(tiny_llama, chosen):
    model = tiny_llama(layers=1)
    for name, p in model.named_parameters():
        p.requires_grad_("proj" in name if chosen == "matrices" else "norm" in name)
    optimizer, before = MuonWithAdamW(model, lr=0.1), weights(model)
    give_gradients(model)
    optimizer.step()
    assert [type(part).__name__ for part in optimizer.parts] == ["Muon" if chosen == "matrices" else "AdamW"]
    moved = {name for name, p in weights(model).items() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_weight_decay_reaches_both(tiny_llama):
    model = tiny_llama(layers=1)
    optimizer, before = MuonWithAdamW(model, lr=0.1, weight_decay=0.5), weights(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in weights(model).items():
        torch.testing.assert_close(p, 0.95 * before[name], msg=name)


def test_its_state_goes_on_in_another(tiny_llama):
    model = tiny_llama(layers=1)
    optimizer = MuonWithAdamW(model, lr=0.1)
    for seed in range(2):
        give_gradients(model, seed)
        optimizer.step()
    other = copy.deepcopy(model)
    resumed = MuonWithAdamW(other, lr=0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["lr"] for group in resumed.param_groups} == {0.1}
    for one, its_optimizer in ((model, optimizer), (other, resumed)):
        for seed in (2, 3):
            give_gradients(one, seed)
            its_optimizer.step()
    for name, p in weights(other).items():
        assert torch.equal(p, model.get_parameter(name)), name
    for group in resumed.param_groups:  # and a scheduler still reaches it
        group["lr"] = 0.0
    before = weights(other)
    resumed.step()
    assert all(torch.equal(p, before[name]) for name, p in weights(other).items())


# In a learner.


def learner_of(draft, frozen=(), **fields) -> Learner:
    trainable = {name for name, _ in draft.named_parameters() if not any(part in name for part in frozen)}
    config = OnlineConfig(
        **{"optim": "muon", "warmup_steps": 0, "batch_size": None, "replay": 0.0, "seed": 0}
        | {"gate": False, "learning_rate": 1e-3}
        | fields
    )
    return Learner(draft, trainable, FeedbackBuffer(), config, lambda weights: None)


def update(learner: Learner, *requests) -> bool:
    for request in requests:
        learner.buffer.add(request)
    return learner.update()


@pytest.mark.parametrize("frozen", [("embed_tokens", "lm_head"), ("norm", "embed_tokens", "lm_head"), ("proj",)])
def test_a_learner_updates_by_it(tiny_llama, make_feedback, frozen):
    draft = tiny_llama(layers=1)
    learner = learner_of(draft, frozen)
    assert update(learner, make_feedback(), make_feedback(seed=1))
    for name, p in learner.ensemble.serving_weights().items():
        assert not torch.equal(p, draft.get_parameter(name)), name


def test_a_resumed_learner_goes_on_as_if_it_had_not_stopped(tiny_llama, make_feedback):
    draft = tiny_llama(layers=1)
    straight, resumed = learner_of(draft), learner_of(draft)
    for i in range(2):
        assert update(straight, make_feedback(seed=i))
    tensors, values = straight.state()
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, copy.deepcopy(values))
    for learner in (straight, resumed):
        assert update(learner, make_feedback(seed=2))
    for name, p in resumed.ensemble.serving_weights().items():
        assert torch.equal(p, straight.ensemble.serving_weights()[name]), name


def test_the_schedule_of_a_trainer_reaches_both(tiny_llama, make_feedback):
    config = OnlineConfig(optim="muon", learning_rate=0.1, weight_decay=0.5, warmup_steps=4, batch_size=1, seed=0)
    trainer = OnlineGKDTrainer(tiny_llama(layers=1), FeedbackBuffer(), config)
    trainer.learn([make_feedback(seed=i) for i in range(3)])
    groups = trainer.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.075, 0.075])
    assert [group["weight_decay"] for group in groups] == [0.5, 0.5]
