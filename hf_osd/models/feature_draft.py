"""`FeatureDraft`: a draft of one decoder layer that reads the target's own hidden states (EAGLE-3, arXiv 2503.01840).

Symbols: B texts of T columns; V tokens; H the draft's width, H_t the target's; F = n·H_t, the target's states after n of its layers, joined.
The column of token t_j reads its embedding and the target's states at j-1, and predicts t_{j+1}; the first token of a text has no column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_osd.models.feature_config import FeatureDraftConfig

_STACKED = 16  # columns up to which the queries of a group are stacked


@dataclass
class FeatureDraftOutput(CausalLMOutputWithPast):
    """What a [`FeatureDraft`] returns: `logits`; to be fed back as the next column's features, `states` `(B, T, H)`; and what the LM head read, `head_states`, which has
    the shape of `logits` but for its width H."""

    states: Tensor | None = None
    head_states: Tensor | None = None


class FeatureDraftRMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        # As other layers are made: transformers loads a model's layers on the meta device, in a dtype of its own.
        ones = torch.ones(size, device=torch.get_default_device(), dtype=torch.get_default_dtype())
        self.weight, self.eps = nn.Parameter(ones), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class FeatureDraftEmbedding(nn.Embedding):
    """Embeddings that are multiplied by a number, which is rounded to their dtype as the target's is."""

    def __init__(self, rows: int, size: int, scale: float):
        super().__init__(rows, size)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        embeds = super().forward(ids)
        return (
            embeds if self.scale == 1.0 else embeds * float(torch.tensor(self.scale, device="cpu", dtype=embeds.dtype))
        )


class FeatureDraftAttention(nn.Module):
    """The projections of the layer's attention, whose input is twice as wide as the layer."""

    def __init__(self, config: FeatureDraftConfig):
        super().__init__()
        self.head_dim, size = config.head_dim, config.hidden_size
        heads, pairs = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(2 * size, heads, bias=False)
        self.k_proj = nn.Linear(2 * size, pairs, bias=False)
        self.v_proj = nn.Linear(2 * size, pairs, bias=False)
        self.o_proj = nn.Linear(heads, size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `(B, h, T, d)`, keys and values `(B, g, T, d)` of `x` `(B, T, 2H)`."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        return _rotated(q, rotary), _rotated(k, rotary), v


class FeatureDraftMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: FeatureDraftConfig):
        super().__init__()
        size, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class FeatureDraftLayer(nn.Module):
    """The decoder layer: its attention reads `[norm(embedding); norm(feature)]`, and its residual stream is the feature."""

    def __init__(self, config: FeatureDraftConfig):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.hidden_norm = FeatureDraftRMSNorm(size, eps)
        self.input_layernorm = FeatureDraftRMSNorm(size, eps)
        self.self_attn = FeatureDraftAttention(config)
        self.post_attention_layernorm = FeatureDraftRMSNorm(size, eps)
        self.mlp = FeatureDraftMLP(config)
        self.norm_before_residual = config.norm_before_residual

    def begin(self, embeds: Tensor, feature: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The residual stream `(B, T, H)`, queries, keys and values of embeddings and features, `(B, T, H)` each."""
        normed = self.hidden_norm(feature)
        inputs = torch.cat([self.input_layernorm(embeds), normed], dim=-1)
        return normed if self.norm_before_residual else feature, *self.self_attn(inputs, rotary)

    def end(self, residual: Tensor, attended: Tensor) -> Tensor:
        """The layer's output `(B, T, H)`, from what its heads read, `(B, h, T, d)`."""
        hidden = residual + self.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class FeatureDraft(PreTrainedModel, GenerationMixin):
    """A causal LM of one layer that reads the target's hidden states. [`grow_feature_draft`] makes one for a target.

    Embeddings and LM head are the target's and do not train.
    """

    config_class = FeatureDraftConfig
    base_model_prefix = ""
    supports_gradient_checkpointing = False
    _no_split_modules = ("FeatureDraftLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012 - as transformers declares it

    def __init__(self, config: FeatureDraftConfig):
        super().__init__(config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = FeatureDraftEmbedding(config.vocab_size, size, config.embed_scale)
        norms = len(config.aux_layers) if config.fc_norm else 0
        self.fc_norm = nn.ModuleList(FeatureDraftRMSNorm(config.target_hidden_size, eps) for _ in range(norms))
        self.input_norm = FeatureDraftRMSNorm(config.states_size, eps) if config.norm_before_fc else None
        self.fc = nn.Linear(config.states_size, size, bias=False)
        self.midlayer = FeatureDraftLayer(config)
        self.norm = FeatureDraftRMSNorm(size, eps)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=config.head_bias)
        if config.draft_vocab_size is not None:
            has = torch.ones(config.vocab_size, device=torch.get_default_device(), dtype=torch.bool)
            self.register_buffer("t2d", has)  # tokens that the head has
        self._norm_output = config.norm_output  # a config takes its time at each look
        self._frequencies: dict[torch.device, tuple[Tensor, float]] = {}
        self._tables: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}  # of the first positions
        self.post_init()
        self.freeze_ends()

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> FeatureDraft | tuple[FeatureDraft, dict]:
        """As transformers has it, and embeddings and LM head do not train."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze_ends()
        return loaded

    def freeze_ends(self):
        """Let embeddings and LM head be what does not train."""
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding):
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear):
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any | None = None,
        use_cache: bool | None = None,
        features: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        unroll: int = 1,
        rows: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> FeatureDraftOutput | tuple:
        """Predict the token after each column.

        Args:
            input_ids (`Tensor` int64 `(B, T)`): the columns' tokens.
            attention_mask (`Tensor` `(B, S)` or `(B, T)`, *optional*): 0 for padding, at the left, of all columns so far or of these.
            position_ids (`Tensor` int64 `(B, T)`, *optional*): counted from the first column that is no padding if left out.
            past_key_values (`Cache`, *optional*): of the columns before.
            use_cache (`bool`, *optional*): make a cache where none is given.
            features (`Tensor` `(B, T, F)` or `(B, T, H)`, *optional*): the target's states at the tokens before, or the draft's own `states` of the columns
                before, of any float dtype; by their width. Zeros if left out.
            logits_to_keep (`int` or `Tensor`): how many of the last columns' logits are wanted, or of which columns; all if 0.
            unroll (`int`): K, the steps of training-time test. `logits` are then `(K, B, T', V)`, and `head_states` likewise: `[k]` at column c is what is predicted there where the draft
                has read the target's states up to column c-k, and its own of the step before at the k columns after it. At the first k columns of a text
                they are finite, and mean nothing. Without a cache.
            rows (`Tensor` int64 `(S,)`, *optional*): which logits of these are wanted, counted over the `(K·B·T')` of them: then `logits` are `(S, V)` and `head_states` `(S, H)`.
            return_dict (`bool`, *optional*): `False` returns `(logits, states)` alone, which takes less time.

        Returns:
            [`FeatureDraftOutput`]: `logits` `(B, T', V)`, `head_states` `(B, T', H)`, and `states` `(B, T, H)` of the first step.

        Raises:
            ValueError: if `features` have another width, or `unroll` comes with a cache.
        """
        embeds = self.embed_tokens(input_ids)
        feature = self._feature(features, embeds)
        if unroll > 1 and (past_key_values is not None or use_cache):
            raise ValueError(f"`unroll` is {unroll}, which works without a cache; leave out `past_key_values`.")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        seen = past + input_ids.shape[1]
        if attention_mask is not None and attention_mask.shape[1] < seen:
            attention_mask = F.pad(attention_mask, (seen - attention_mask.shape[1], 0), value=1)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]
        if position_ids is None:
            rotary = tuple(table[:, :, past:seen] for table in self._table(seen, embeds))
        else:
            rotary = self._rotary(position_ids, embeds.dtype)
        residual, q, k, v = self.midlayer.begin(embeds, feature, rotary)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, 0)
        allowed = _causal(q.shape[2], k.shape[2], attention_mask, q.device)
        attended = _attended(q, k, v, allowed)
        states = [self._fed_back(self.midlayer.end(residual, attended))]
        if unroll > 1:
            states += self._unrolled(embeds, states[0], rotary, k, v, attention_mask, unroll)
        hidden = states[0] if unroll == 1 else torch.stack(states)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = hidden[..., keep, :]
        if rows is not None:
            hidden = hidden.flatten(0, -2)[rows]
        hidden = hidden if self._norm_output else self.norm(hidden)
        logits = self.lm_head(hidden)
        if return_dict is False:
            return logits, states[0]
        return FeatureDraftOutput(logits=logits, past_key_values=past_key_values, states=states[0], head_states=hidden)

    def _feature(self, features: Tensor | None, embeds: Tensor) -> Tensor:
        """What the layer reads beside the embeddings, `(B, T, H)`."""
        if features is None:
            return torch.zeros_like(embeds)
        width, features = features.shape[-1], features.to(embeds.dtype)
        if width == embeds.shape[-1]:
            return features
        if width != self.config.states_size:
            raise ValueError(
                f"`features` has width {width}; give the target's states after layers {self.config.aux_layers}, joined, of width {self.config.states_size}, or the "
                f"draft's own `states`, of width {self.config.hidden_size}."
            )
        if self.input_norm is not None:
            features = self.input_norm(features)
        if len(self.fc_norm):
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def _fed_back(self, output: Tensor) -> Tensor:
        return self.norm(output) if self._norm_output else output

    def _unrolled(
        self,
        embeds: Tensor,
        state: Tensor,
        rotary: tuple[Tensor, Tensor],
        k: Tensor,
        v: Tensor,
        attention_mask: Tensor | None,
        steps: int,
    ) -> list[Tensor]:
        """The states of the steps after the first, `(B, T, H)` each, at the columns that they predict from.

        At step i+1 column c reads the target's keys up to c-i, `k` and `v`, and its own chain: of each step between the one column that leads to it.
        """
        states, chain = [], []
        columns = torch.arange(k.shape[2], device=k.device)
        for step in range(1, steps):
            residual, q, own_k, own_v = self.midlayer.begin(embeds, _shifted(state, 1), rotary)
            chain = [(_shifted(a, 1), _shifted(b, 1)) for a, b in chain] + [(own_k, own_v)]
            allowed = columns <= columns[:, None] - step  # (T, T)
            if attention_mask is not None:
                allowed = allowed & attention_mask[:, None, None, None].bool()
            q = q.unflatten(1, (k.shape[1], -1))  # (B, g, h/g, T, d)
            scores = (q @ k[:, :, None].mT).masked_fill(~allowed, -torch.inf)
            scores = [scores, *((q * a[:, :, None]).sum(-1, keepdim=True) for a, _ in chain)]
            weights = (torch.cat(scores, dim=-1).float() / q.shape[-1] ** 0.5).softmax(-1).to(v.dtype)
            weights, *ours = weights.split([k.shape[2], *(1 for _ in chain)], dim=-1)
            attended = weights @ v[:, :, None] + sum(w * b[:, :, None] for w, (_, b) in zip(ours, chain, strict=True))
            state = self._fed_back(self.midlayer.end(residual, attended.flatten(1, 2)))
            states.append(state)
        return states

    def _table(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(1, 1, N, d)` of positions 0 … N-1, N ≥ `length`, in the dtype and on the device of `like`. Made once for all texts."""
        key = like.device, like.dtype
        if (table := self._tables.get(key)) is None or table[0].shape[2] < length:
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(1 << (length - 1).bit_length(), device=like.device)[None]
                table = self._tables[key] = self._rotary(positions, like.dtype)
        return table

    def _rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(B, 1, T, d)`."""
        if positions.device not in self._frequencies:
            with torch.inference_mode(False):  # made there, they could not be used in training
                self._frequencies[positions.device] = rotary_frequencies(self.config, positions.device)
        frequencies, scale = self._frequencies[positions.device]
        angles = positions[:, None, :, None].float() * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def rotary_frequencies(config: FeatureDraftConfig, device: torch.device | str = "cpu") -> tuple[Tensor, float]:
    """Return the rotary frequencies `(d/2,)`, in radians a position, and what cosines and sines are multiplied by."""
    kind = config.rope_parameters["rope_type"]
    if kind != "default":
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, device)
        return frequencies.to(device), scale
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    return config.rope_parameters["rope_theta"] ** -exponents, 1.0


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rotary[0] + torch.cat([-second, first], dim=-1) * rotary[1]


def _attended(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Attend with queries `(B, h, T, d)` to keys and values `(B, g, S, d)`, h a multiple of g: `(B, h, T, d)`.

    Queries that share keys are stacked as further rows where they are few. `enable_gqa` copies keys and values for each of them, which takes several times as
    long as attending does; stacked masks of many columns would take the memory.
    """
    if q.shape[2] > _STACKED:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and allowed is not None:
        allowed = allowed.repeat(1, 1, groups, 1)
    stacked = q.reshape(len(q), k.shape[1], groups * q.shape[2], q.shape[3])
    return F.scaled_dot_product_attention(stacked, k, v, attn_mask=allowed).reshape(q.shape)


def _shifted(x: Tensor, columns: int) -> Tensor:
    """`x` `(..., T, d)` with each column where a later one was, and zeros in the first ones."""
    return F.pad(x, (0, 0, columns, 0))[..., : x.shape[-2], :]


def _causal(t: int, seen: int, attention_mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of `seen` columns each of the last t reads, `(1 or B, 1, t, seen)`; `None` for all. Padding reads itself, or it would read nothing."""
    if attention_mask is None and t == 1:
        return None
    columns = torch.arange(seen, device=device)
    allowed, itself = columns <= columns[seen - t :, None], columns == columns[seen - t :, None]
    if attention_mask is None:
        return allowed[None, None]
    return allowed & attention_mask[:, None, None].bool() | itself


AutoConfig.register(FeatureDraftConfig.model_type, FeatureDraftConfig, exist_ok=True)
AutoModelForCausalLM.register(FeatureDraftConfig, FeatureDraft, exist_ok=True)
