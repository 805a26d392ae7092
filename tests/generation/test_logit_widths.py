"""Targets and drafts that give fewer logits, or have fewer embeddings, than their config has tokens: what is said stays the target's own."""

import copy

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaForCausalLM

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.distill.loss_head import LossHead
from hf_osd.models.draft_head import can_select_rows

from ..served import GREEDY, PROMPTS

WIDTH = 50  # of 64
LEARNS = {"update_interval": 1, "gate": False, "seed": 0, "learning_rate": 1e-2, "learning_budget": 1.0}
DRAFTS = {"lookahead": "constant", "suffix_cache": False}


class Cut(LlamaForCausalLM):
    """Cuts the padding of its head off."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits[..., :WIDTH]
        return outputs


def cut(model, **config):
    model = copy.deepcopy(model)
    model.__class__ = Cut
    vars(model.config).update({"unpadded_vocab_size": WIDTH} | config)
    return model


def kinds(target, draft):
    """Targets and drafts, and in how many of four calls the draft may draft."""
    return {
        "both": (cut(target), cut(draft), 4),
        "target": (cut(target), draft, 3),
        "draft": (target, cut(draft), 4),
        "a draft that does not say it": (target, cut(draft, unpadded_vocab_size=None), 4),
    }


KINDS = ["both", "target", "draft", "a draft that does not say it"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["full", "auto"])
@pytest.mark.parametrize("sample", [False, True])
def test_logits_that_are_cut_are_served_and_learnt(target, draft, kind, head, sample):
    one, other, calls = kinds(target, draft)[kind]
    assistant = OnlineAssistant(other, draft_head=head, draft_vocab_size=8, **DRAFTS, **LEARNS)
    drafted = 0
    for prompt in PROMPTS[:4] % 40:
        before = assistant.stats.total.drafted
        answer = one.generate(prompt, assistant_model=assistant, **GREEDY | {"do_sample": sample})
        drafted += assistant.stats.total.drafted > before
        assert int(answer.max()) < (64 if one is target else WIDTH)
        assert sample or torch.equal(answer, one.generate(prompt, **GREEDY))
    assert drafted == calls
    assistant.flush()
    assert assistant.stats.updates > 0
    assert assistant.stats.failed_updates == 0


def test_rows_of_a_head_that_is_cut_are_not_chosen(draft):
    assert can_select_rows(draft)
    assert not can_select_rows(cut(draft))
    assert LossHead.install(cut(draft)) is None


def beyond(target, rows):
    """As `target`, with more embeddings than logits."""
    target = copy.deepcopy(target)
    old = target.model.embed_tokens
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target.model.embed_tokens = nn.Embedding(rows, old.weight.shape[1])
    return target


def fewer(draft, rows):
    """As `draft`, with fewer embeddings than logits."""
    draft = copy.deepcopy(draft)
    draft.model.embed_tokens = nn.Embedding.from_pretrained(draft.model.embed_tokens.weight[:rows].clone())
    return draft


@pytest.mark.parametrize("learn", ["inline", False])
def test_a_prompts_tokens_that_the_draft_has_no_embedding_of(target, draft, learn):
    """As the place of an image, which lies beyond what a target of that kind says."""
    one = beyond(target, 72)
    assistant = OnlineAssistant(draft, **DRAFTS, **LEARNS | {"learn": learn})
    for prompt in PROMPTS[:3]:
        prompt = torch.cat([prompt, torch.tensor([[70, 71]]), prompt], 1)
        assert torch.equal(one.generate(prompt, assistant_model=assistant, **GREEDY), one.generate(prompt, **GREEDY))
    assistant.flush()
    assert assistant.stats.total.drafted > 0
    assert (assistant.stats.failed_updates, assistant.stats.updates > 0) == (0, bool(learn))


@pytest.mark.parametrize("sample", [False, True])
def test_target_tokens_that_the_draft_has_no_embedding_of(target, draft, sample):
    assistant = OnlineAssistant(fewer(draft, 40), **DRAFTS, **LEARNS)
    for prompt in PROMPTS[:4]:
        answer = target.generate(prompt, assistant_model=assistant, **GREEDY | {"do_sample": sample})
        assert sample or torch.equal(answer, target.generate(prompt, **GREEDY))
    assistant.flush()
    assert assistant.stats.total.drafted > 0
    assert (assistant.stats.failed_updates, assistant.stats.updates > 0) == (0, True)


def test_a_sources_tokens_that_a_drafts_encoder_has_no_embedding_of():
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(
        vocab_size=64, d_model=32, **sides, **heads, decoder_start_token_id=2, forced_eos_token_id=None
    )
    draft = BartForConditionalGeneration(config).eval()
    target = copy.deepcopy(draft)
    for side in (target.model.encoder, target.model.decoder):
        side.embed_tokens = nn.Embedding(72, 32)
    source = torch.tensor([[5, 70, 6, 71, 7]])
    assistant = OnlineAssistant(draft, **DRAFTS, **LEARNS)
    for _ in range(3):
        assert torch.equal(
            target.generate(source, assistant_model=assistant, **GREEDY), target.generate(source, **GREEDY)
        )
    assistant.flush()
    assert assistant.stats.total.drafted > 0
    assert (assistant.stats.failed_updates, assistant.stats.updates > 0) == (0, True)


def test_a_grown_draft_of_such_a_target_is_as_wide(target):
    one = cut(target)
    assert OnlineAssistant(grow_draft(one), learn=False).reach.width == WIDTH
