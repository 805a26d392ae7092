"""Drafts that learn in an adapter, and what the tests look at of their weights."""

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_osd import OnlineAssistant

from ...served import PROMPTS, serve

LORA = {"learning_budget": 1.0, "adapter": "lora", "lora": 4, "gate": False, "seed": 0, "learning_rate": 1e-2}


def learning(draft, **fields):
    return OnlineAssistant(draft, **{**LORA, "update_interval": 2} | fields)


def flushed(target, draft, prompts=PROMPTS[:6], **fields):
    """An assistant that has learnt from some requests, once."""
    assistant = learning(draft, **{"update_interval": 10**6} | fields)
    serve(target, assistant, prompts)
    assert assistant.flush()
    return assistant


def drawn(adapter, scale=0.1, seed=0):
    """Weights of an adapter that does something."""
    random = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(p.shape, generator=random) for name, p in adapter.weights().items()}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(model, before):
    return all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def storage(model):
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=128)).eval()


def mixtral():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def t5():
    sizes = {"vocab_size": 64, "d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, eos_token_id=1)).eval()
