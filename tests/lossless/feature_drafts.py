"""Feature-level drafts of the lossless suite: fitted to a few prompts, so that they are right in part; and what they should have drafted, by forwards that keep nothing
from round to round."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from hf_osd import grow_feature_draft
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED


def states_of(target, text: Tensor, layers: Sequence[int]) -> Tensor:
    """The target's states at each token of a text `(1, L)`, by one forward: `(1, L, F)`."""
    with torch.no_grad():
        hidden = target(text, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([hidden[layer] for layer in layers], dim=-1)


def fitted(target, prompts: Sequence[Tensor], n: int = 24, steps: int = 60, layers: Sequence[int] | None = None):
    """A draft that has learnt the target's own greedy answers to these prompts, from scratch."""
    draft = grow_feature_draft(target, layers, seed=0).float()
    texts = [target.generate(p, max_new_tokens=n, do_sample=False, pad_token_id=0) for p in prompts]
    states = [states_of(target, text, draft.config.aux_layers) for text in texts]
    trained = [p for p in draft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        for text, state in zip(texts, states, strict=True):
            logits = draft(text[:, 1:-1], features=state[:, :-2], unroll=3).logits[:, 0]  # (3, L-2, V)
            sum(F.cross_entropy(logits[k, k:], text[0, 2 + k :]) for k in range(3)).backward()
        optimizer.step()
    return draft.eval()


@torch.no_grad()
def drafts_after(target, draft, text: Tensor, n: int, first: int = 0) -> list[int]:
    """The n tokens that the draft should propose after a text `(1, M)`: true states up to its last token but one, its own from there. It reads the text from token
    `first` on, and the target all of it."""
    states, cache = states_of(target, text, draft.config.aux_layers), DynamicCache(config=draft.config)
    text, states = text[:, first:], states[:, first:]
    out = draft(text[:, 1:], features=states[:, :-1].to(draft.dtype), past_key_values=cache, use_cache=True)
    tokens = []
    while True:
        token = out.logits[:, -1:].argmax(-1)
        tokens.append(int(token))
        if len(tokens) == n:
            return tokens
        out = draft(token, features=out.states[:, -1:], past_key_values=cache, use_cache=True)


def check_drafted(target, draft, feedback, gamma: int, first: int = 0):
    """Each round drafted what it should, and what became of it is what is recorded. The first token comes without a draft, for nothing is known of the target yet. The draft
    reads the text from token `first` on."""
    text, start = feedback.tokens[None].long(), feedback.prompt_length
    at, end, accepted_once = 1, len(feedback), 0
    assert feedback.outcome[0] == UNTESTED
    while at < end:
        room = min(gamma, end - at - 1)  # the last token that there is room for is the target's
        drafted = drafts_after(target, draft, text[:, : start + at], room, first) if room else []
        answer = feedback.answer[at:].tolist()
        matches = next((i for i, (a, b) in enumerate(zip(drafted, answer, strict=False)) if a != b), len(drafted))
        tested = min(matches + 1, len(drafted))
        assert feedback.drafted[at : at + tested].tolist() == drafted[:tested]
        assert feedback.outcome[at : at + tested].tolist() == [ACCEPTED] * matches + [REJECTED] * (tested - matches)
        accepted_once += matches
        at += matches + 1
    return accepted_once
