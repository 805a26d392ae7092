"""`FeatureDraft`: one decoder layer that reads the target's hidden states (EAGLE-3, arXiv 2503.01840), and predicts from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class FeatureDraftConfig(PreTrainedConfig):
    model_type = "osd_feature_draft"

    def __init__(self, vocab_size=128, hidden_size=32, target_hidden_size=None, aux_layers=(1, 2, 3), intermediate_size=64, num_attention_heads=4,
                 num_key_value_heads=None, head_dim=None, rms_norm_eps=1e-5, rope_theta=10000.0, max_position_embeddings=2048, head_bias=False, embed_scale=1.0, **kwargs):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.target_hidden_size = target_hidden_size or hidden_size
        self.aux_layers = list(aux_layers)
        self.intermediate_size, self.num_attention_heads = intermediate_size, num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rms_norm_eps, self.rope_theta = rms_norm_eps, rope_theta
        self.max_position_embeddings, self.head_bias, self.embed_scale = max_position_embeddings, head_bias, embed_scale
        self.num_hidden_layers = 1
        super().__init__(tie_word_embeddings=False, **kwargs)


@dataclass
class FeatureDraftOutput(CausalLMOutputWithPast):
    states: Tensor | None = None


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv, self.dim, self.theta = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rope_theta
        self.q_proj = nn.Linear(2 * c.hidden_size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(2 * c.hidden_size, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(2 * c.hidden_size, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, c.hidden_size, bias=False)

    def project(self, x, positions):
        B, T, _ = x.shape
        q, k, v = (p(x).view(B, T, -1, self.dim).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        inv = self.theta ** (-torch.arange(0, self.dim, 2, device=x.device, dtype=torch.float32) / self.dim)
        angle = positions[..., None].float() * inv
        angle = torch.cat([angle, angle], -1)[:, None]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        rot = lambda t: t * cos + torch.cat([-t[..., self.dim // 2 :], t[..., : self.dim // 2]], -1) * sin
        return rot(q), rot(k), v

    def out(self, y):
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        H = c.hidden_size
        self.hidden_norm, self.input_layernorm, self.post_attention_layernorm = (RMSNorm(H, c.rms_norm_eps) for _ in range(3))
        self.self_attn = Attention(c)
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(H, c.intermediate_size, bias=False), "up_proj": nn.Linear(H, c.intermediate_size, bias=False),
                                  "down_proj": nn.Linear(c.intermediate_size, H, bias=False)})

    def project(self, e, f, positions):
        return self.self_attn.project(torch.cat([self.input_layernorm(e), self.hidden_norm(f)], -1), positions)

    def finish(self, f, y):
        f = f + self.self_attn.out(y)
        x = self.post_attention_layernorm(f)
        return f + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](x)) * self.mlp["up_proj"](x))


class FeatureDraft(PreTrainedModel, GenerationMixin):
    config_class = FeatureDraftConfig
    base_model_prefix = ""
    _supports_sdpa = True
    _tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        H = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.target_hidden_size)
        self.state_norms = nn.ModuleList(RMSNorm(config.target_hidden_size, config.rms_norm_eps) for _ in config.aux_layers)
        self.fc = nn.Linear(len(config.aux_layers) * config.target_hidden_size, H, bias=False)
        self.midlayer = Layer(config)
        self.norm = RMSNorm(H, config.rms_norm_eps)
        self.lm_head = nn.Linear(H, config.vocab_size, bias=config.head_bias)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def _features(self, features, e):
        H = self.config.hidden_size
        if features is None:
            return e.new_zeros(*e.shape[:2], H)
        if features.shape[-1] == H:
            return features.to(e.dtype)
        parts = features.to(e.dtype).chunk(len(self.state_norms), -1)
        return self.fc(torch.cat([norm(part) for norm, part in zip(self.state_norms, parts, strict=True)], -1))

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, features=None, logits_to_keep=0, unroll=1, **kwargs):
        e = self.embed_tokens(input_ids)
        if self.config.embed_scale != 1.0:
            e = e * torch.tensor(self.config.embed_scale, dtype=e.dtype, device=e.device)
        T = e.shape[1]
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            if attention_mask is not None and not past:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
            else:
                position_ids = torch.arange(past, past + T, device=e.device)[None]
        f = self._features(features, e)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        q, k, v = self.midlayer.project(e, f, position_ids)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, 0)
        S = k.shape[2]
        allowed = torch.ones(T, S, dtype=torch.bool, device=e.device).tril(S - T)[None, None]
        if attention_mask is not None and not past:
            allowed = allowed & attention_mask.bool()[:, None, None, :] | torch.eye(T, S, dtype=torch.bool, device=e.device)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if T == 1 else allowed, enable_gqa=True)
        states = [self.midlayer.finish(f, y)]
        if unroll > 1:
            groups = q.shape[1] // k.shape[1]
            chains = []
            for step in range(1, unroll):
                shifted = torch.cat([e[:, step:], e[:, -1:].expand(-1, min(step, T), -1)], 1)[:, :T]
                own = states[-1]
                qs, ks, vs = self.midlayer.project(shifted, own, position_ids + step)
                chains.append((ks.repeat_interleave(groups, 1), vs.repeat_interleave(groups, 1)))
                scale = qs.shape[-1] ** -0.5
                base = (qs.unflatten(1, (-1, groups)) @ k[:, :, None].mT).flatten(1, 2) * scale
                base = base.masked_fill(~allowed, -torch.inf)
                own_scores = [(qs * kk).sum(-1, keepdim=True) * scale for kk, _ in chains]
                w = torch.cat([base, *own_scores], -1).float().softmax(-1).to(v.dtype)
                y = (w[..., :S].unflatten(1, (-1, groups)) @ v[:, :, None]).flatten(1, 2)
                for j, (_, vv) in enumerate(chains):
                    y = y + w[..., S + j : S + j + 1] * vv
                states.append(self.midlayer.finish(own, y))
            aligned = [torch.cat([s[:, :1].expand(-1, min(i, T), -1), s[:, : max(T - i, 0)]], 1) if i else s for i, s in enumerate(states)]
            hidden = torch.stack(aligned)
        else:
            hidden = states[0]
        keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        logits = self.lm_head(self.norm(hidden[..., keep, :]))
        return FeatureDraftOutput(logits=logits, past_key_values=past_key_values, states=states[0])


def grow_feature_draft(target, aux_layers=None, seed=0):
    text = target.config.get_text_config(decoder=True)
    L, H = text.num_hidden_layers, text.hidden_size
    aux = list(aux_layers or sorted({min(2, L), max(L // 2, 1), max(L - 3, 1)}))
    heads = text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * H
    head = target.get_output_embeddings()
    table = target.get_input_embeddings()
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope) or {}
    c = FeatureDraftConfig(vocab_size=head.weight.shape[0], hidden_size=H, aux_layers=aux, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads, head_dim=getattr(text, "head_dim", None) or H // heads,
        rope_theta=rope.get("rope_theta", 10000.0), max_position_embeddings=text.max_position_embeddings, head_bias=head.bias is not None,
        embed_scale=float(getattr(table, "embed_scale", 1.0)))
    g = torch.Generator().manual_seed(seed)
    draft = FeatureDraft(c)
    with torch.no_grad():
        for name, p in draft.named_parameters():
            if p.dim() > 1:
                p.copy_(0.02 * torch.randn(p.shape, generator=g))
        draft.fc.weight.zero_()
        draft.fc.weight[:, -H:] = torch.eye(H)
        norms = [m for n, m in target.named_modules() if n.endswith("norm") or n.endswith("ln_f") or n.endswith("final_layernorm")]
        w = norms[-1].weight
        draft.norm.weight.copy_(w + 1 if "Gemma" in type(norms[-1]).__name__ else w)
    draft.to(target.dtype)
    draft.embed_tokens.weight = nn.Parameter(table.weight.detach(), requires_grad=False)
    draft.lm_head.weight = nn.Parameter(head.weight.detach(), requires_grad=False)
    if head.bias is not None:
        draft.lm_head.bias = nn.Parameter(head.bias.detach(), requires_grad=False)
    return draft.to(target.device).eval()
