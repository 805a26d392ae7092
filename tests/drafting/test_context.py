"""The draft's reading of a call: rows of logits where they belong, whatever it has fallen behind, and a cache without stale rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.drafting.context import DraftContext
from hf_osd.models.properties import draft_window

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def draft(tiny_llama):
    return tiny_llama()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 3)), max_size=6))
def test_logits_are_those_of_a_fresh_forward_in_every_round(draft, rounds):
    """Rounds of (drafted, accepted, pieces of the token that ends the round), some without a draft."""
    random = torch.Generator().manual_seed(0)
    context = DraftContext(draft, torch.randint(64, (4,), generator=random))
    unscored: list[int] = []  # where the target's tokens start that the draft was never asked about
    for drafted, accepted, size in rounds:
        accepted = min(accepted, drafted)
        tokens = torch.randint(64, (drafted,), generator=random)
        with torch.no_grad():
            if drafted:
                logits = context.catch_up(len(unscored))
                torch.testing.assert_close(
                    logits.logits, draft(context.ids).logits[0, [*(i - 1 for i in unscored), -1]], **CLOSE
                )
                unscored, read = [], context.ids
                for token in tokens[:-1]:  # the last draft is never read
                    read = torch.cat([read, token[None, None]], dim=-1)
                    logits = context.step(token[None, None])
                    torch.testing.assert_close(logits.logits, draft(read).logits[0, -1:], **CLOSE)
        context.crop(accepted)
        context.extend(tokens[None, :accepted], [1] * accepted)
        if accepted == drafted:
            unscored.append(context.length)  # a bonus token, or one of a round without drafts
        context.extend(torch.randint(64, (1, size), generator=random), [size])
    assert context.unread > 0


def test_a_window_that_the_config_does_not_say_is_endless(draft):
    assert draft_window(draft) == 512
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 8, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    assert draft_window(T5ForConditionalGeneration(T5Config(**sizes))) == float("inf")
