"""`LossHead`: the same head for whoever asks for all of it, and columns that on average stand for all."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hf_osd.config import OnlineConfig
from hf_osd.distill.collator import FeedbackCollator
from hf_osd.distill.ensemble import make_student
from hf_osd.distill.loss_head import LossHead, loss_columns, sampled_tail
from hf_osd.distill.trainer import OnlineGKDTrainer
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.learning.learner import Learner

VOCAB = 512


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    size=st.integers(20, 400),
    rows=st.integers(1, 6),
    k=st.integers(1, 8),
    samples=st.integers(1, 100),
    seed=st.integers(0, 10**6),
)
def test_columns_are_those_of_the_targets_and_as_many_others_as_asked(size, rows, k, samples, seed):
    top_ids = torch.randint(size, (rows, k), generator=seeded(seed))
    asked = set(top_ids.flatten().tolist())
    chosen = loss_columns(top_ids, size, samples, seeded(seed))
    if chosen is None:
        assert len(asked) + samples >= size // 2
        return
    columns, at, support, _ = chosen
    assert torch.equal(columns[at], top_ids)
    assert set(columns[:support].tolist()) == asked
    assert len(columns) == len(asked) + samples < size / 2
    assert len(set(columns.tolist())) == len(columns), "each once, and so none of the targets' is drawn"
    assert columns.min() >= 0
    assert columns.max() < size


def test_the_others_are_drawn_uniformly():
    """By their rank among the others, of which the support leaves gaps, at both ends too: off by one in a gap, and some never come."""
    support, size, samples, draws, random = [0, 3, 4, 19], 20, 3, 4000, seeded()
    counts = torch.zeros(size)
    for _ in range(draws):
        columns, _, known, _ = loss_columns(torch.tensor([support]), size, samples, random)
        counts[columns[known:]] += 1
    assert counts[support].sum() == 0
    counts = counts[[i for i in range(size) if i not in support]]
    share = samples / len(counts)
    # A count has standard deviation 25 around 750; the draws are seeded.
    assert ((counts - draws * share).abs() < 5 * math.sqrt(draws * share * (1 - share))).all(), counts


def test_draws_repeat_with_their_generator():
    one, two, other = (loss_columns(torch.tensor([[5, 9]]), 100, 10, seeded(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("size", "samples", "saves"), [(100, 39, True), (100, 40, False), (64, 2048, False)])
def test_a_head_with_hardly_more_columns_is_computed_whole(size, samples, saves):
    assert (loss_columns(torch.arange(10)[None], size, samples) is not None) == saves


def test_sums_of_exp_over_the_columns_are_unbiased():
    logits = 2 * torch.randn(3, 200, generator=seeded(), dtype=torch.float64)
    top_ids, random, sums = logits.topk(4).indices, seeded(1), []
    for _ in range(2000):
        columns, _, support, _ = loss_columns(top_ids, 200, 30, random)
        sums.append(sampled_tail(logits[:, columns], support, 200).exp().sum(-1))
    sums, dense = torch.stack(sums), logits.exp().sum(-1)
    error = sums.std(0) / math.sqrt(len(sums))
    assert (error < 0.01 * dense).all(), "the mean is known well enough to tell"
    assert ((sums.mean(0) - dense).abs() < 4 * error).all()


def test_with_all_others_drawn_nothing_is_estimated():
    logits = torch.randn(3, 50, generator=seeded())
    assert torch.equal(sampled_tail(logits, 7, 50), logits)


# In a draft.


@pytest.fixture(scope="module")
def drafts(tiny_llama):
    """One draft by each name."""
    from transformers import AutoModelForCausalLM, GPT2Config, PhiConfig

    def of(config):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config).eval()

    return {
        "llama": tiny_llama,
        "tied": lambda: tiny_llama(tie_word_embeddings=True),
        "gpt2": lambda: of(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=64)),
        "biased": lambda: of(
            PhiConfig(
                vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                bos_token_id=0, eos_token_id=1,
            )
        ),
    }  # fmt: skip


def logits_of(model, ids=None):
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12)[None] if ids is None else ids).logits


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "biased"])
def test_a_draft_with_one_is_the_same_draft(drafts, name):
    draft = drafts[name]()
    parameters = dict(draft.named_parameters(remove_duplicate=False))
    keys, before = list(draft.state_dict()), logits_of(draft)
    head = LossHead.install(draft)
    assert draft.get_output_embeddings() is head
    now = dict(draft.named_parameters(remove_duplicate=False))
    assert list(now) == list(parameters)
    assert all(p is parameters[n] for n, p in now.items()), "tied or not, these are the very parameters"
    assert list(draft.state_dict()) == keys
    assert torch.equal(logits_of(draft), before)
    assert not head.training


@pytest.mark.parametrize("name", ["llama", "gpt2", "biased"])
def test_only_some_columns_are_those_of_all(drafts, name):
    draft = drafts[name]()
    head, columns = LossHead.install(draft), torch.tensor([40, 3, 17, 63])
    if head.bias is not None:
        nn.init.normal_(head.bias)
    whole = logits_of(draft)
    with head.only(columns):
        some = logits_of(draft)
    torch.testing.assert_close(some, whole[..., columns], atol=1e-5, rtol=1e-5)  # float32, another product
    assert torch.equal(logits_of(draft), whole)
    with pytest.raises(RuntimeError, match="in between"), head.only(columns):
        raise RuntimeError("in between")
    assert torch.equal(logits_of(draft), whole)


def biased_by_token():
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForConditionalGeneration(BartConfig(vocab_size=64, d_model=16, **sizes, **heads))


def test_a_head_that_is_more_than_a_linear_layer_stays(tiny_llama):
    hooked, patched, twice = tiny_llama(), tiny_llama(), tiny_llama()
    hooked.lm_head.register_forward_hook(lambda head, inputs, logits: 2 * logits)
    patched.forward = patched.forward  # as accelerate does
    LossHead.install(twice)
    for draft in (hooked, patched, twice, biased_by_token()):
        head = draft.get_output_embeddings()
        assert LossHead.install(draft) is None
        assert draft.get_output_embeddings() is head


def test_the_base_of_a_lora_draft_gets_one_and_learns_by_it(tiny_llama, make_feedback):
    from peft import LoraConfig, get_peft_model

    draft = get_peft_model(tiny_llama(vocab=VOCAB), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    trainable = {name for name, p in draft.named_parameters() if p.requires_grad}
    config = OnlineConfig(sampled_columns=32, warmup_steps=0, gate=False, learning_rate=1e-3, seed=0)
    learner = Learner(make_student(draft, trainable, config), FeedbackBuffer(), lambda weights: None)
    assert type(draft.get_output_embeddings()) is nn.Linear, "the draft that was passed is not the learner's"
    head = learner.student.module.base_model.model.lm_head
    assert isinstance(head, LossHead)
    assert torch.equal(logits_of(learner.student.module.eval()), logits_of(draft.eval()))
    widths = widths_of(head)
    learner.buffer.add(make_feedback(vocab=VOCAB, k=4))
    before = {name: p.clone() for name, p in learner.student.serving_weights().items()}
    assert learner.update()
    assert widths
    assert max(widths) <= 4 * 12 + 32
    assert any(not torch.equal(p, before[name]) for name, p in learner.student.serving_weights().items())


def widths_of(head: nn.Module) -> list[int]:
    """How many logits a row each forward from now on gives."""
    widths = []
    head.register_forward_hook(lambda head, inputs, logits: widths.append(logits.shape[-1]))
    return widths


# Under the loss.


@pytest.fixture
def batch(make_feedback):
    """23 rows, whose targets are up to 69 of 512 tokens."""
    requests = [make_feedback(n=n, prompt=4, vocab=VOCAB, k=3, seed=n, dtype=torch.float32) for n in (11, 12)]
    return FeedbackCollator()(requests)


def trainer_of(model, **fields) -> OnlineGKDTrainer:
    return OnlineGKDTrainer(model, FeedbackBuffer(), OnlineConfig(**{"seed": 0} | fields))


def gradient(trainer, batch) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    return torch.cat([p.grad.flatten() for p in trainer.model.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("divergence", ["forward_kl", "total_variation"])
def test_the_gradient_is_near_the_dense_one_on_average(tiny_llama, batch, divergence):
    model = tiny_llama(layers=1, vocab=VOCAB)
    head = LossHead.install(model)
    fields = {"divergence": divergence, "total_variation_weight": 0.0}
    exact = gradient(trainer_of(copy.deepcopy(model), sampled_columns=None, **fields), batch)
    trainer, widths = trainer_of(model, sampled_columns=96, **fields), widths_of(head)
    drawn = torch.stack([gradient(trainer, batch) for _ in range(100)])
    assert set(widths) == {len(batch["top_ids"].unique()) + 96}
    one, mean = ((g - exact).norm() / exact.norm() for g in (drawn[0], drawn.mean(0)))
    assert mean < one, "the draws differ, and their errors cancel"
    assert mean < 0.1


def test_without_samples_the_loss_is_the_dense_one(tiny_llama, batch):
    plain = tiny_llama(layers=1, vocab=VOCAB)
    with_head = copy.deepcopy(plain)
    widths = widths_of(LossHead.install(with_head))
    expected = trainer_of(plain, sampled_columns=96).compute_loss(plain, batch)  # a head as it comes is computed whole
    for samples in (None, 2048):
        trainer = trainer_of(with_head, sampled_columns=samples)
        assert torch.equal(trainer.compute_loss(trainer.model, batch), expected)
    assert set(widths) == {VOCAB}


def test_whoever_asks_for_outputs_gets_all_logits(tiny_llama, batch):
    model = tiny_llama(layers=1, vocab=VOCAB)
    LossHead.install(model)
    trainer = trainer_of(model, sampled_columns=96)
    loss, outputs = trainer.compute_loss(model, batch, return_outputs=True)
    assert outputs.logits.shape == (23, VOCAB)
    assert torch.equal(loss, trainer_of(model, sampled_columns=None).compute_loss(model, batch))


def test_a_head_that_trains_gets_gradients_where_it_was_computed(tiny_llama, batch):
    model = tiny_llama(layers=1, vocab=VOCAB)
    head = LossHead.install(model)
    widths = widths_of(head)
    gradient(trainer_of(model, sampled_columns=96), batch)
    rows = head.weight.grad.abs().sum(-1) > 0
    assert rows[batch["top_ids"]].all()
    assert rows.sum() == widths[0] < VOCAB


def test_a_learner_trains_the_head_if_asked(tiny_llama, make_feedback):
    draft = tiny_llama(layers=1, vocab=VOCAB)
    trainable = {name for name, _ in draft.named_parameters()}
    config = OnlineConfig(
        sampled_columns=32, warmup_steps=0, freeze_embeddings=False, gate=False, learning_rate=1e-3, seed=0
    )
    learner = Learner(make_student(draft, trainable, config), FeedbackBuffer(), lambda weights: None)
    learner.buffer.add(make_feedback(vocab=VOCAB, k=4))
    assert learner.update()
    assert not torch.equal(learner.student.serving_weights()["lm_head.weight"], draft.lm_head.weight)
