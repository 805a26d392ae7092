"""The text as a feature-level draft reads it: every prediction is that of a fresh forward, however the text grew."""

import pytest
import torch

from hf_osd.drafting.context import DraftLogits
from hf_osd.drafting.feature_context import FeatureCache, FeatureContext
from hf_osd.models.feature_draft import FeatureDraft, FeatureDraftConfig


@pytest.fixture
def draft():
    config = FeatureDraftConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2, head_dim=6
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draft = FeatureDraft(config).eval()
        for parameter in draft.parameters():
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return draft


def test_drafts_after_any_rounds_are_those_of_fresh_forwards(draft):
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (90,), generator=random)
    states = torch.randn(1, 90, draft.config.states_size, generator=random)
    layers = [None] * 28
    context, length = FeatureContext(draft, ids[:3]), 3
    read = 0  # tokens whose states the context has
    while length < 80:  # the cache outgrows its room, and the rotary table its length
        for i, part in zip(draft.config.aux_layers, states[:, read : length - 1].chunk(3, dim=-1), strict=True):
            layers[i] = part
        context.add_states(layers, length - 1 - read)
        read = length - 1
        with torch.no_grad():
            drafted = [context.catch_up(0).logits]
            for token in ids[length : length + 2]:
                drafted.append(context.step(token[None, None]).logits)
            fresh = FeatureContext(draft, ids[:length])
            features, columns = states[:, : length - 1], ids[None, 1:length]
            for got, token in zip(drafted, (*ids[length : length + 2], None), strict=True):
                out = draft(columns, features=features, use_cache=True, past_key_values=fresh._cache)
                torch.testing.assert_close(got, out.logits[0, -1:], rtol=1e-4, atol=1e-5)
                columns, features = None if token is None else token[None, None], out.states[:, -1:]
        step = 1 + length % 5
        context.crop(1)
        context.extend(ids[None, length : length + step], [1] * step)
        length += step


def test_its_cache_holds_what_was_appended_and_not_cropped():
    cache, expected = FeatureCache(), torch.empty(1, 2, 0, 3)
    for count in (4, 1, 200, 1, 90):
        new = torch.randn(1, 2, count, 3)
        with torch.inference_mode(count == 200):
            keys, values = cache.update(new, -new, 0)
        expected = torch.cat([expected, new], dim=2)
        assert torch.equal(keys, expected)
        assert torch.equal(values, -expected)
        cache.crop(-2)
        expected = expected[:, :, :-2]
        assert cache.get_seq_length() == expected.shape[2]


def test_confidence_is_the_largest_probability_and_zero_where_all_is_ruled_out():
    logits = torch.tensor([[0.0, 1.0, 2.0], [-torch.inf, -torch.inf, -torch.inf], [5.0, -torch.inf, -torch.inf]])
    expected = torch.tensor([logits[0].softmax(-1)[2], 0.0, 1.0])
    torch.testing.assert_close(DraftLogits(logits).confidence(), expected)
