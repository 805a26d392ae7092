"""The layouts of feature-level drafts on disk, and the configs of those that serving engines read.

| layout | is | embeddings and LM head |
|---|---|---|
| `osd` | what `save_pretrained` of transformers writes; `AutoModelForCausalLM` and `load_draft` read it | both, as the target has them |
| `eagle3` | EAGLE's and SpecForge's; SGLang and vLLM read it | the head's rows of the draft vocabulary; no embeddings, which engines take from the target |
| `speculators` | that of vllm-project/speculators; `vllm serve FOLDER` is enough | as `eagle3` |

An engine's draft vocabulary: `t2d` bool `(V,)`, the target's tokens that it has, and `d2t` int64 `(D,)`: row i of the head is token i + d2t[i]. With all of the
target's tokens there is neither: vLLM has no place for them then, and does not load. Engines join the states in ascending order of layers.
Sources: sgl-project/SpecForge, vllm-project/speculators, and `llama_eagle3.py` of vLLM and SGLang. vLLM 0.32 was run with both (docs/engines.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from hf_osd.models.blueprint import depth_of
from hf_osd.models.feature_config import FeatureDraftConfig
from hf_osd.models.feature_growth import of_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.models.feature_draft import FeatureDraft

LAYOUTS = ("osd", "eagle3", "speculators")

_EAGLE3 = {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"}
_SWITCHES = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
_SHAPE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_SHAPE += ("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "vocab_size")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def feature_layout(config: Mapping) -> str | None:
    """Which of the `LAYOUTS` a `config.json` is of; `None` if it is no feature-level draft's.

    Raises:
        ValueError: if it is of another kind of speculator.
    """
    if config.get("model_type") == FeatureDraftConfig.model_type:
        return "osd"
    if (kind := config.get("speculators_model_type")) is not None:
        if kind != "eagle3":
            raise ValueError(
                f"`speculators_model_type` is {kind!r}; of speculators hf_osd reads 'eagle3' alone. Choose such a one."
            )
        return "speculators"
    return "eagle3" if _EAGLE3 & set(config.get("architectures") or ()) else None


def check_expressible(draft: FeatureDraft):
    config = draft.config
    bias = draft.lm_head.bias
    if bias is not None and config.draft_vocab_size is None:
        raise ValueError("The LM head has a bias, which no engine's layout has. Save with layout='osd'.")
    if config.target_num_hidden_layers in config.aux_layers:
        raise ValueError(
            f"`aux_layers` is {config.aux_layers}: the states after the last layer, {config.target_num_hidden_layers}, are normalised here and not in engines. Grow the "
            "draft with other `aux_layers`, or save with layout='osd'."
        )


def _layer_config(config: FeatureDraftConfig) -> dict:
    """What engines read of a Llama's config."""
    layer = {"model_type": "llama", **{name: getattr(config, name) for name in _SHAPE}}
    layer |= {name: value for name in _TOKENS if (value := getattr(config, name)) is not None}
    rope = {k: v for k, v in config.rope_parameters.items() if k != "rope_theta"}
    layer["rope_theta"] = config.rope_parameters["rope_theta"]
    layer["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    return layer | {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "use_cache": True}


def _dtype(draft: FeatureDraft) -> str:
    return str(draft.dtype).removeprefix("torch.")


def eagle3_config(draft: FeatureDraft, rows: int) -> dict:
    config = draft.config
    made = {"architectures": ["LlamaForCausalLMEagle3"], **_layer_config(config), "draft_vocab_size": rows}
    made |= {"target_hidden_size": config.target_hidden_size, "torch_dtype": _dtype(draft)}
    # SpecForge takes `norm_output: false` for a head without its last norm; left out, it means the same to all.
    made |= {name: getattr(config, name) for name in _SWITCHES if name != "norm_output" or config.norm_output}
    # vLLM reads the first, which counts layers as we do; SGLang and SpecForge the second, by the layer whose output it is.
    layers = sorted(config.aux_layers)
    made |= {"eagle_aux_hidden_state_layer_ids": layers, "num_aux_hidden_states": len(layers)}
    nested = {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in layers], "use_aux_hidden_state": True}
    return made | {"eagle_config": nested | {"norm_before_fc": config.norm_before_fc}}


def verifier_of(draft: FeatureDraft, verifier: str | None) -> str:
    """Return the target's name for the layout `speculators`: the one given, or the one that the draft was grown for.

    Raises:
        ValueError: if there is neither.
    """
    if name := verifier or draft.config.target_name_or_path:
        return name
    raise ValueError(
        "`verifier` is not given and the draft's config has no name of its target; pass verifier='the name or folder of the target'."
    )


def speculators_config(draft: FeatureDraft, rows: int, verifier: str | None, tokens: int) -> dict:
    config, name = draft.config, verifier_of(draft, verifier)
    if tokens < 1:
        raise ValueError(f"`speculative_tokens` is {tokens}; choose 1 or more.")
    method = {"proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        # No `model_type`: speculators writes none, and vLLM knows the layout by its absence.
        "architectures": ["Eagle3DraftModel"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": name, "architectures": config.target_architectures or []},
        },
        # vLLM hands on these keys alone, and takes the number of states for 3 where it is not among them.
        "transformer_layer_config": _layer_config(config) | {"num_aux_hidden_states": len(config.aux_layers)},
        "draft_vocab_size": rows,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": sorted(config.aux_layers),
        **{name: getattr(config, name) for name in _SWITCHES},
        "embed_requires_grad": False,
        "tie_word_embeddings": False,
        "dtype": _dtype(draft),
    }


def read_config(raw: dict, layout: str, target: PreTrainedModel) -> FeatureDraftConfig:
    """The draft's config by an engine's `config.json`.

    Raises:
        ValueError: if it is of a variant that hf_osd does not read, by its name.
    """
    layer = raw if layout == "eagle3" else raw.get("transformer_layer_config") or {}
    nested = raw.get("eagle_config") or {}
    _refuse_variants(raw, layer, nested)
    lacking = [
        name for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size") if name not in layer
    ]
    if lacking:
        raise ValueError(f"The config.json of the draft lacks {lacking[0]!r}. Save or download it again.")
    depth = depth_of(target)
    aux = raw.get("eagle_aux_hidden_state_layer_ids")
    if not aux and (others := nested.get("eagle_aux_hidden_state_layer_ids")):
        aux = [i + 1 for i in others]
    switches = {name: bool(nested.get(name, raw.get(name, False))) for name in _SWITCHES}
    rope = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    rope = {"rope_type": rope.pop("type", "default"), "rope_theta": layer.get("rope_theta", 10000.0), **rope}
    if "partial_rotary_factor" in layer:
        rope["partial_rotary_factor"] = layer["partial_rotary_factor"]
    shape = {name: layer[name] for name in (*_SHAPE, *_TOKENS) if layer.get(name) is not None}
    return FeatureDraftConfig(
        **{"num_hidden_layers": 1, "rms_norm_eps": 1e-6} | shape,
        target_hidden_size=raw.get("target_hidden_size") or layer["hidden_size"],
        # Engines join the states in the order of layers, whatever the config's.
        aux_layers=sorted(aux) if aux else [2, depth // 2, depth - 3],
        rope_parameters=rope,
        draft_vocab_size=raw.get("draft_vocab_size"),
        **switches,
        **of_target(target),
    )


def _refuse_variants(raw: dict, layer: dict, nested: dict):
    """See that an engine's config asks for nothing that a [`FeatureDraft`] has not."""
    odd = {
        "a layer of another architecture": layer.get("model_type", "llama") != "llama" and layer.get("model_type"),
        "`attention_bias`": layer.get("attention_bias"),
        "`qkv_bias`": layer.get("qkv_bias"),
        "`mlp_bias`": layer.get("mlp_bias"),
        "`bias`": layer.get("bias"),
        "`hidden_act`": layer.get("hidden_act", "silu") != "silu" and layer["hidden_act"],
        "`use_sliding_window`": layer.get("use_sliding_window"),
        "`layer_types`": "sliding_attention" in (layer.get("layer_types") or ()) and layer["layer_types"],
        "`logit_scale`": raw.get("logit_scale", 1.0) != 1.0 and raw["logit_scale"],
        "`use_aux_hidden_state`": not nested.get("use_aux_hidden_state", True) and "false",
        "`quantization_config`": raw.get("quantization_config"),
        "`parallel_drafting`": raw.get("parallel_drafting") or raw.get("mask_token_id"),
    }
    found = next(((name, value) for name, value in odd.items() if value not in (None, False)), None)
    if found is not None:
        raise ValueError(
            f"The draft is a variant of EAGLE-3 that hf_osd does not read: {found[0]} ({found[1]}). Choose a head of one plain Llama layer."
        )
