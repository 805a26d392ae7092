"""Greedy answers of targets with recurrent states, served while drafts learn, against plain decoding: tiny random models of each family, in float32.

python -m recipes.checks.recurrent --tokens 2400 --threads 1
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
import transformers

from hf_osd import OnlineAssistant, OnlineConfig, grow_feature_draft
from hf_osd.system.bounds import check_options, option, whole
from recipes.common.command import run_command
from recipes.common.models import use_threads

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 8,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
_LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES = {
    "Qwen3_5ForCausalLM": _DELTA,
    "Qwen3_5MoeForCausalLM": _DELTA | EXPERTS,
    "Qwen3NextForCausalLM": _DELTA | EXPERTS,
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        **MAMBA,
    },
    "BambaForCausalLM": {"attn_layer_indices": [1, 3], **MAMBA},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64, **MAMBA},
    "OlmoHybridForCausalLM": _DELTA | {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "KimiLinearForCausalLM": {
        **_LATENT,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2,
    },
    "BailingHybridForCausalLM": {
        **_LATENT,
        "q_lora_rank": None,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "layer_group_size": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_mtp_layers": 0,
    },
}


@dataclass
class RecurrentArguments:
    """How much to compare. Of `OnlineConfig` the seed and the settings of learning count."""

    tokens: int = option(2400, whole(1), "Tokens to compare of each family, at least.")
    max_new_tokens: int = option(60, whole(4), "Tokens of an answer.")
    threads: int = option(1, whole(1), "CPU threads.")

    def __post_init__(self):
        check_options(self)


def main(argv: list[str] | None = None) -> int:
    """Compare each family and print a row; the exit status is 1 if an answer differs."""
    return run_command(RecurrentArguments, compare, argv)


def random_model(kind: type, config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """Make a random model, with weights so large that its answers do not repeat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.3)
    return model


def model_of(name: str, **values) -> transformers.PreTrainedModel:
    """Make a tiny random model of a family."""
    kind = getattr(transformers, name)
    return random_model(kind, kind.config_class(**{**SIZES, **FAMILIES[name], **values}))


def compare(args: RecurrentArguments, config: OnlineConfig):
    """Serve prompts in turn from the suffix cache alone and with a feature draft that learns."""
    use_threads(args.threads)
    random, different = torch.Generator("cpu").manual_seed(config.seed or 0), 0
    print("| family | tokens compared | different answers | rounds | drafted | accepted | read again | updates |")
    print("|---|---|---|---|---|---|---|---|")
    for name in FAMILIES:
        target = model_of(name)
        settings = {"lookahead": "constant", "update_interval": 2, "learning_rate": 5e-3, "gate": False}
        settings |= {"learning_budget": 1.0, "seed": 0}
        assistants = [OnlineAssistant(**settings), OnlineAssistant(grow_feature_draft(target, seed=0), **settings)]
        compared = wrong = 0
        while compared < args.tokens:
            prompt = torch.randint(2, SIZES["vocab_size"], (1, 8), generator=random)
            asked = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
            plain = target.generate(prompt, **asked)
            for assistant in (*assistants, assistants[0]):  # the cache knows the answer the second time
                output = target.generate(prompt, assistant_model=assistant, **asked)
                compared += output.shape[1] - prompt.shape[1]
                wrong += not torch.equal(output, plain)
        total = assistants[0].stats.total
        total.add(assistants[1].stats.total)
        different += wrong
        counts = (compared, wrong, total.rounds, total.drafted, total.accepted, total.refed_tokens)
        print(f"| {name} | {' | '.join(map(str, counts))} | {assistants[1].stats.updates} |", flush=True)
    if different:
        raise ValueError(f"{different} answers are not those of plain decoding.")


if __name__ == "__main__":
    sys.exit(main())
