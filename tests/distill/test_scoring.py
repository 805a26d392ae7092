"""`score`: α by a plain loop over positions, whatever the batch, the padding and the architecture; and the faster head under it."""

import contextlib
import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, OPTConfig

from hf_osd.distill import scoring
from hf_osd.distill.scoring import judge, score
from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.models.heads import contiguous_head

SHAPES = [(9, 4), (3, 7), (12, 1), (5, 6), (3, 2)]  # (prompt, answer); not in the order of their lengths


def noised(model, by):
    """A draft that agrees with `model` in part."""
    draft = copy.deepcopy(model)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=random))
    return draft


def requests_of(target, answer_of, k=16):
    random = torch.Generator().manual_seed(0)
    return [answer_of(target, torch.randint(2, 64, (p,), generator=random), n, k=k) for p, n in SHAPES]


def dense_rows(model, feedback):
    """The model's distribution at each position of the answer, each by a forward of its own over what stands before it."""
    rows = []
    with torch.no_grad():
        for i in range(len(feedback)):
            prefix = feedback.tokens[None, : feedback.prompt_length + i].long()
            rows.append(model(input_ids=prefix, use_cache=False).logits[0, -1])
    return torch.stack(rows)


def family(name):
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = {
        "gpt2": lambda: GPT2Config(**tokens, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "opt": lambda: OPTConfig(
            **tokens,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=64,
            max_position_embeddings=64,
        ),
        "bloom": lambda: BloomConfig(**tokens, hidden_size=32, n_layer=2, n_head=4),  # takes no position_ids
    }[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return noised(AutoModelForCausalLM.from_config(config).eval(), 0.2)


def test_the_target_as_its_own_draft_is_always_accepted(tiny_llama, answer_of):
    target = tiny_llama()
    for overlap, (_, n) in zip(score(target, requests_of(target, answer_of)), SHAPES, strict=True):
        assert overlap.tolist() == [1.0] * n


def test_the_beginning_of_a_word_that_is_several_tokens_is_no_hit(tiny_llama, answer_of):
    """The draft may say how it begins; a call would not propose that."""
    target = tiny_llama()
    [request] = requests_of(target, answer_of)[:1]
    rest = torch.arange(len(request)) == 2
    spelled = dataclasses.replace(request, tail_logp=request.tail_logp.masked_fill(rest, torch.nan))
    torch.testing.assert_close(score(target, [spelled])[0], torch.tensor([1.0, 0.0, torch.nan, 1.0]), equal_nan=True)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom"])
def test_it_is_a_loop_over_positions(tiny_llama, answer_of, name, batch_size):
    target = tiny_llama() if name == "llama" else family(name)
    draft, requests = noised(target, 0.07), requests_of(target, answer_of)
    expected = [(dense_rows(draft, f).argmax(-1) == f.answer).float().tolist() for f in requests]
    assert 0 < sum(map(sum, expected)) < sum(map(len, expected)), "the draft is right at times"
    assert [overlap.tolist() for overlap in score(draft, requests, batch_size)] == expected


def test_a_model_that_computes_all_logits_scores_the_same(tiny_llama, answer_of, monkeypatch):
    target = tiny_llama()
    draft, requests = noised(target, 0.07), requests_of(target, answer_of)
    expected = [overlap.tolist() for overlap in score(draft, requests)]
    monkeypatch.setattr(draft, "_supports_logits_to_keep", lambda: False)
    assert [overlap.tolist() for overlap in score(draft, requests)] == expected


def sampled(target, answer_of, k):
    return [dataclasses.replace(f, sampled=True) for f in requests_of(target, answer_of, k)]


@pytest.mark.parametrize("k", [4, 64])
def test_sampled_requests_score_the_overlap_of_the_stored_top_k(tiny_llama, answer_of, k):
    target = tiny_llama()
    draft = noised(target, 0.1)
    for overlap, f in zip(score(draft, sampled(target, answer_of, k)), sampled(target, answer_of, k), strict=True):
        p, q = dense_rows(target, f).softmax(-1), dense_rows(draft, f).softmax(-1)
        dense, ids = torch.minimum(p, q), f.top_ids.long()
        # float32, padded or not.
        torch.testing.assert_close(overlap, dense.gather(-1, ids).sum(-1), atol=1e-4, rtol=0)
        assert (overlap <= dense.sum(-1) + 1e-4).all(), "a lower bound: what lies in the tail is not counted"
        if k == 64:
            torch.testing.assert_close(overlap, dense.sum(-1), atol=1e-4, rtol=0)


def test_greedy_and_sampled_requests_may_share_a_batch(tiny_llama, answer_of):
    target = tiny_llama()
    greedy, random = requests_of(target, answer_of)[0], sampled(target, answer_of, 16)[1]
    draft = noised(target, 0.1)
    apart = [score(draft, [f])[0] for f in (greedy, random)]
    for together, alone in zip(score(draft, [greedy, random]), apart, strict=True):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


def test_the_overlap_is_the_same_without_the_rest(tiny_llama, answer_of):
    target = tiny_llama()
    draft = noised(target, 0.1)
    greedy, random = requests_of(target, answer_of), sampled(target, answer_of, 16)
    for requests in (greedy, random, [*greedy, *random]):
        for part, whole in zip(judge(draft, requests, whole=False), judge(draft, requests), strict=True):
            assert torch.equal(part.overlap, whole.overlap)
            assert not whole.confidence.isnan().any()
    assert all(one.confidence.isnan().all() and one.shared.isnan().all() for one in judge(draft, greedy, whole=False))


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_draft_in_its_mode_and_without_gradients(tiny_llama, answer_of, training):
    draft = tiny_llama().train(training)
    score(draft, requests_of(draft, answer_of))
    assert draft.training == training
    assert all(p.grad is None for p in draft.parameters())


def test_dropout_does_not_reach_the_score(answer_of):
    """A learner's module is in training mode between updates."""
    target = family("gpt2")
    assert target.transformer.drop.p > 0
    requests = requests_of(target, answer_of)
    target.train()
    assert all((overlap == 1).all() for overlap in score(target, requests))


def test_of_no_requests_there_are_no_scores(tiny_llama):
    assert score(tiny_llama(), []) == []


def test_a_position_is_scored_by_what_stands_before_it():
    """Off by one, a draft that repeats its input would look perfect on a text that counts up."""

    class SaysNext:
        """A draft that answers t with t+1."""

        device = torch.device("cpu")
        training = False

        def forward(self, input_ids, attention_mask, use_cache):
            logits = torch.nn.functional.one_hot((input_ids + 1) % 64, 64).float()
            return type("Output", (), {"logits": logits})()

        __call__ = forward

        def eval(self):
            return self

        train = eval_ = lambda self, mode=True: self

        def _supports_logits_to_keep(self):
            return False

        def get_output_embeddings(self):
            return torch.nn.Identity()

    tokens = torch.tensor([5, 6, 7, 8, 20, 21])
    rows = SparseLogits.from_logits(torch.zeros(4, 64), 4, torch.float32)
    assert score(SaysNext(), [Feedback.from_target(tokens, 2, rows)])[0].tolist() == [1, 1, 0, 1]


def reading(head):
    """Whether each input that the head's forward gets from now on is contiguous; after the hooks that stand before it."""
    seen = []
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].is_contiguous()))
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_contiguous_head_changes_no_score(tiny_llama, answer_of, monkeypatch, name):
    target = tiny_llama() if name == "llama" else family(name)
    draft, requests = noised(target, 0.07), requests_of(target, answer_of)
    seen = reading(draft.get_output_embeddings())
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "contiguous_head", lambda model: contextlib.nullcontext())
        before = judge(draft, requests)
    assert not all(seen), "the case has rows that are not contiguous by themselves"
    seen.clear()
    now = judge(draft, requests)
    assert seen
    assert all(seen)
    for one, was in zip(now, before, strict=True):
        assert torch.equal(one.overlap, was.overlap)
        for name in ("confidence", "shared"):  # float32: another product, another order of sums
            torch.testing.assert_close(getattr(one, name), getattr(was, name), atol=1e-5, rtol=0)


def test_a_contiguous_head_still_carries_gradients(tiny_llama):
    draft = tiny_llama()
    with contiguous_head(draft):
        draft(input_ids=torch.arange(2, 8).view(2, 3), logits_to_keep=2).logits.sum().backward()
    assert all(p.grad is not None for p in draft.parameters())


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_no_hook_stays_on_the_head(tiny_llama, error):
    draft = tiny_llama()
    head = draft.get_output_embeddings()
    with contextlib.suppress(ValueError, KeyboardInterrupt), contiguous_head(draft):
        assert len(head._forward_pre_hooks) == 1
        if error is not None:
            raise error
    assert not head._forward_pre_hooks


def test_no_hook_stays_where_scoring_fails(tiny_llama, answer_of, monkeypatch):
    draft = tiny_llama()
    requests = requests_of(draft, answer_of)

    def failing(model, batch):
        raise RuntimeError("planted")

    monkeypatch.setattr(scoring, "answer_logits", failing)
    with pytest.raises(RuntimeError, match="planted"):
        score(draft, requests)
    assert not draft.get_output_embeddings()._forward_pre_hooks
