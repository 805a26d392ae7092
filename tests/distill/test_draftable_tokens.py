"""A feature-level draft whose LM head lacks tokens of the target's learns the others as if the target had these alone, as far as it wants them."""

from dataclasses import replace

import pytest
import torch

from hf_osd import (
    OnlineAssistant,
    OnlineConfig,
    grow_feature_draft,
    load_feature_draft,
    record_answers,
    save_feature_draft,
)
from hf_osd.config import DIVERGENCES
from hf_osd.distill.feature_collator import FeatureCollator
from hf_osd.distill.loss_head import loss_columns
from hf_osd.distill.losses import among_draftable, divergence, draft_buckets, target_buckets
from hf_osd.distill.trainer import OnlineGKDTrainer
from hf_osd.feedback.buffer import FeedbackBuffer

HAS = torch.arange(64) % 3 != 0  # two thirds of the tokens


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4, bos_token_id=None, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def draft(target, tmp_path_factory):
    """One with a head of its own, of the tokens `HAS`, as it comes from a checkpoint."""
    folder = tmp_path_factory.mktemp("draft")
    grown = grow_feature_draft(target, seed=0)
    with torch.no_grad():
        grown.lm_head.weight = torch.nn.Parameter(1.5 * grown.lm_head.weight, requires_grad=False)
    save_feature_draft(grown, folder, "eagle3", draft_vocab=HAS.nonzero().squeeze(-1))
    loaded = load_feature_draft(folder, target)
    assert loaded.config.draft_vocab_size == int(HAS.sum())
    return loaded


@pytest.fixture(scope="module")
def answers(target, draft):
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, 64, (6,), generator=random) for _ in range(12)]
    return record_answers(target, prompts, 10, batch_size=12, top_k=64, states_of=draft.config.aux_layers)


def gradient(draft, requests, **config):
    """The loss of one step, and its gradients by name."""
    config = OnlineConfig(**{"seed": 0, "unrolled_steps": 1, "learner_dtype": "float32"} | config)
    trainer = OnlineGKDTrainer(draft, FeedbackBuffer(), config)
    batch = FeatureCollator(draft.config.states_size)(requests)
    draft.zero_grad()
    loss = trainer.compute_loss(draft, batch)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in draft.named_parameters() if p.grad is not None}, batch


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_the_gradient_is_that_of_the_target_among_the_tokens_there_are(draft, answers, kind):
    loss, found, batch = gradient(draft, answers, divergence=kind, sampled_columns=None)
    names = ("input_ids", "attention_mask", "position_ids", "features")
    logits = draft(**{name: batch[name] for name in names}, logits_to_keep=batch["keep"]).logits.flatten(0, 1)
    logits = logits[batch["rows"]][:, HAS]
    p = torch.full_like(logits.new_empty(len(logits), 64), -torch.inf)
    p = p.scatter(-1, batch["top_ids"], batch["top_logps"].float())[:, HAS]  # all 64 are kept
    mass = p.logsumexp(-1, keepdim=True)
    weight = 0.0 if kind == "total_variation" else 1.0
    plain = divergence(p - mass, logits.log_softmax(-1), kind, 0.5, weight) * mass.squeeze(-1).exp()
    draft.zero_grad()
    plain.mean().backward()
    assert 0.1 < float(mass.exp().mean()) < 0.9
    torch.testing.assert_close(loss, plain.mean().detach(), atol=1e-4, rtol=1e-3)
    for name, p in draft.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=2e-3)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_what_it_lacks_altogether_teaches_nothing_and_is_finite(draft, answers, kind):
    lacking = (~HAS).nonzero().squeeze(-1)[:16].int()
    sure = torch.full((16,), -12.0).index_fill(0, torch.tensor([0]), -1e-3)

    def wants(one, ids, sure):
        n = len(one)
        tail = torch.full((n,), -16.0)
        return replace(one, top_ids=ids.expand(n, -1), top_logps=sure.expand(n, -1), tail_logp=tail, prompt_rows=None)

    for ruled_out in (sure, sure.masked_fill(sure < -1, -torch.inf)):
        loss, found, _ = gradient(draft, [wants(one, lacking, ruled_out) for one in answers], divergence=kind)
        assert float(loss) < 1e-4
        assert all(bool(g.isfinite().all()) and float(g.abs().max()) < 1e-4 for g in found.values())
    there = HAS.nonzero().squeeze(-1)[:16].int()
    _, found, _ = gradient(draft, [wants(one, there, sure) for one in answers], divergence=kind)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-3


def test_drawn_columns_are_ones_that_there_are():
    has = torch.arange(900) % 3 != 0
    top_ids = torch.tensor([[0, 1, 2], [5, 9, 899]])
    columns, at, support, size = loss_columns(top_ids, 900, 40, torch.Generator().manual_seed(0), has)
    assert torch.equal(columns[at], top_ids)
    assert (support, len(columns), size) == (6, 46, 600 + 2)  # 0 and 9 are lacking, and asked for
    assert has[columns[support:]].all()
    assert len(set(columns.tolist())) == 46


def test_of_all_tokens_nothing_changes():
    random = torch.Generator().manual_seed(0)
    logits, ids = torch.randn(5, 64, generator=random), torch.randint(64, (5, 4), generator=random)
    rows = torch.randn(5, 64, generator=random).log_softmax(-1)
    top = rows.gather(-1, ids := rows.topk(4).indices)
    p = target_buckets(top, torch.log1p(-top.exp().sum(-1)))
    same, q, weights = among_draftable(p, draft_buckets(logits, ids), torch.ones(5, 4, dtype=torch.bool))
    torch.testing.assert_close(same, p, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(q, draft_buckets(logits, ids))
    torch.testing.assert_close(weights, torch.ones(5))


@pytest.mark.parametrize("columns", [None, 8])
def test_it_learns_what_it_serves_and_never_drafts_what_it_lacks(target, draft, columns):
    config = {
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "ema_decay": 0.0,
        "gate": False,
        "learning_budget": 1.0,
        "seed": 0,
    }
    config |= {"lookahead": "constant", "suffix_cache": False, "update_interval": 4, "sampled_columns": columns}
    prompts = torch.randint(3, 60, (4, 1, 6), generator=torch.Generator().manual_seed(0))
    assistant = OnlineAssistant(draft, top_k=8, **config)
    alphas = []
    for _ in range(10):
        for prompt in prompts:
            asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            plain = target.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)
            ours = target.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=assistant, **asked)
            assert torch.equal(ours, plain)
        alphas.append(assistant.stats.last.alpha)
    requests = assistant.buffer.requests()
    said = torch.cat([one.answer[1:].long() for one in requests])
    drafted = torch.cat([one.drafted for one in requests])
    assert HAS[drafted[drafted >= 0].long()].all()
    assert assistant.stats.failed_updates == 0
    assert 0.3 < float(HAS[said].float().mean()) < 0.95
    assert alphas[-1] > alphas[0] + 0.2
    assert all(bool(p.isfinite().all()) for p in assistant.serving.active.parameters())
