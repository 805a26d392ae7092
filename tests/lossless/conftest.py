"""The lossless suite: `pytest -m lossless` runs what lies here, and nothing else. Here are its tiny models, and its ways of serving."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from hf_osd import Feedback, OnlineAssistant
    from hf_osd.metrics.stats import Stats

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.lossless)


# No EOS: an answer that ends early tests less than it seems to.
_IDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
_SEQ2SEQ = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
_IMAGE = 63  # the token that stands for a patch of an image


def _architectures(layers: int) -> dict[str, tuple[str, dict]]:
    """Name -> class, and the values of its config.

    `initializer_range` and its like are large, heads untied and some seeds chosen for one end: greedy answers that say many different
    tokens. With the usual 0.02 they say one.
    """
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 64,
        "max_position_embeddings": 128, "initializer_range": 0.3,
    }  # fmt: skip
    base = {**_IDS, **sizes}
    grouped = {**base, "num_key_value_heads": 2}
    kinds = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": kinds}
    gpt2 = {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": layers,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.3,
    }
    opt = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "tie_word_embeddings": False}
    experts = {
        "num_experts_per_tok": 2,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    t5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": layers, "num_heads": 4}
    bart = {
        "vocab_size": 64, "d_model": 32, "encoder_layers": layers, "decoder_layers": layers, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128, "init_std": 0.1,
        "tie_word_embeddings": False,
    }  # fmt: skip
    clip = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    llava = {"text_config": {**grouped, "model_type": "llama"}, "vision_config": clip, "image_token_index": _IMAGE}
    return {
        "Llama": ("LlamaForCausalLM", grouped),
        "Qwen2": ("Qwen2ForCausalLM", grouped),
        "Qwen3": ("Qwen3ForCausalLM", {**grouped, "head_dim": 8}),
        "Gemma3": ("Gemma3ForCausalLM", {**grouped, **gemma, "tie_word_embeddings": False}),  # a hybrid cache
        "Mistral": ("MistralForCausalLM", {**grouped, "sliding_window": 8}),  # shorter than the answers
        "GPT2": ("GPT2LMHeadModel", {**_IDS, **gpt2}),
        "GPTNeoX": ("GPTNeoXForCausalLM", base),
        "Phi": ("PhiForCausalLM", base),
        "OPT": ("OPTForCausalLM", {**base, **opt}),
        "Mixtral": ("MixtralForCausalLM", {**grouped, "num_local_experts": 4, "num_experts_per_tok": 2}),
        "Qwen2Moe": ("Qwen2MoeForCausalLM", {**grouped, **experts}),
        "T5": ("T5ForConditionalGeneration", {**_IDS, **_SEQ2SEQ, **t5}),
        "Bart": ("BartForConditionalGeneration", {**_IDS, **_SEQ2SEQ, **bart}),
        "Llava": ("LlavaForConditionalGeneration", {**_IDS, **llava}),
    }


_SEEDS = {"T5": 10, "GPT2": 9, "GPTNeoX": 5, "Phi": 7, "OPT": 10}


@pytest.fixture(scope="session")
def tiny_model() -> Callable:
    """`tiny_model(name, layers=3, seed=0, **config)`: a random model of an architecture, hidden size 32 and 64 tokens, in eval mode; the
    same one for the same arguments."""
    import transformers

    def make(name: str, layers: int = 3, seed: int = 0, **config):
        class_name, values = _architectures(layers)[name]
        kind = getattr(transformers, class_name)
        with torch.random.fork_rng():
            torch.manual_seed(seed + _SEEDS.get(name, 0))
            model = kind(kind.config_class(**{**values, **config})).eval()
            if name == "T5":
                _enliven(model)
        return model

    return make


@pytest.fixture(scope="module")
def target(tiny_model):
    """What a file serves that asks for no other."""
    return tiny_model("Llama")


@pytest.fixture(scope="module")
def draft(target, noised_copy):
    """One that agrees with the file's target on some tokens and not on others."""
    return noised_copy(target, 0.1)


def _enliven(t5):
    """T5 has no positions but relative ones, a tied head and small weights: left so, it repeats its first token for ever."""
    with torch.no_grad():
        for name, p in t5.named_parameters():
            if "SelfAttention" in name or "DenseReluDense" in name:
                p.mul_(4)
            elif name == "shared.weight":
                p.mul_(2)
        t5.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn(t5.lm_head.weight.shape))


@dataclass
class Served:
    """What calls with one assistant left behind."""

    outputs: list[Tensor]  # (1, L+N) each
    feedback: list[Feedback]  # of those calls that no update has learnt from
    assistant: OnlineAssistant

    @property
    def stats(self) -> Stats:
        return self.assistant.stats


def plain_and(**kwargs) -> dict:
    """The suite's usual arguments of generate: greedy, and longer than every window."""
    return {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **kwargs}


@pytest.fixture(scope="session")
def serve() -> Callable:
    """`serve(target, draft, prompts, config=None, **generate kwargs) -> Served`: one call a prompt, one after the other, with one assistant.

    `draft` may be an assistant already; else one is made that drafts whatever it costs, keeps distributions whole and, unless
    `config` says otherwise, learns nothing.
    """
    from hf_osd import OnlineAssistant

    from .checks import SERVES_AT_ONCE

    def call(target, draft, prompts, config: dict | None = None, **kwargs) -> Served:
        if isinstance(draft, OnlineAssistant):
            assistant = draft
        else:
            settings = {"lookahead": "constant", "update_interval": 10**6, "top_k": 64, "feedback_dtype": "float32"}
            settings |= {"learning_rate": 1e-3, "seed": 0, **SERVES_AT_ONCE}
            assistant = OnlineAssistant(draft, **{**settings, **(config or {})})
        outputs = [target.generate(p, assistant_model=assistant, **plain_and(**kwargs)) for p in prompts]
        assistant.update()
        return Served(outputs, assistant.buffer.new(), assistant)

    return call


@pytest.fixture(scope="session")
def serve_as_plain(serve) -> Callable:
    """`serve`, greedy, that asserts each output equal to that of the target alone, token for token."""

    def call(target, draft, prompts, config: dict | None = None, **kwargs) -> Served:
        plain = [target.generate(p, **plain_and(**kwargs)) for p in prompts]
        served = serve(target, draft, prompts, config, **kwargs)
        for ours, own in zip(served.outputs, plain, strict=True):
            assert ours.tolist() == own.tolist()
        return served

    return call


@pytest.fixture(scope="session")
def tokenizer():
    """A token a word, none of which is part of another. StopStringCriteria wants "abcdef" to be writable."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", *(a + b for a in "bcfghklmnp" for b in "aeiouy"), "xa", "abcdef"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>")
