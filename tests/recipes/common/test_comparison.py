"""`Comparison`: what the suffix cache alone knows before each request, and in which order a request is decoded."""

import pytest
import torch

from hf_osd import OnlineAssistant, grow_draft
from recipes.common import comparison
from recipes.common.comparison import Comparison


@pytest.fixture
def prompts() -> list[torch.Tensor]:
    return [torch.randint(2, 60, (6,), generator=torch.Generator().manual_seed(i)) for i in range(6)]


def held(assistant: OnlineAssistant) -> list[int]:
    """The texts in an assistant's cache, one after another."""
    assistant.collect()
    return assistant.texts.for_tenant(None)._index._log.tolist()


@pytest.mark.parametrize("suffix_cache_bytes", [2**20, 20_000])
def test_the_cache_alone_holds_what_the_assistants_own_does_and_never_the_answer(
    target, draft, prompts, monkeypatch, suffix_cache_bytes
):
    """Also where the oldest texts are dropped, for lack of room."""
    assistant = OnlineAssistant(draft, learn=False, suffix_cache_bytes=suffix_cache_bytes)
    compared = Comparison(target, assistant, 10, {})
    before = [held(assistant)]
    generate, asked = Comparison._generate, []

    def generating(self, prompt, assistant_model=None):
        if assistant_model is not None:
            # The answer is there once a call has ended and was collected, so only what is not this request's own can be.
            asked.append(held(compared.alone))
            assert assistant_model is assistant or asked[-1] == before[-1]
        return generate(self, prompt, **({} if assistant_model is None else {"assistant_model": assistant_model}))

    monkeypatch.setattr(Comparison, "_generate", generating)
    for i, prompt in enumerate(prompts):
        found = compared.decode(prompt, i if i % 3 else None)
        assert set(found) == ({"online", "plain", "cache"} if i % 3 else {"online"})
        outputs = [output for output, _ in found.values()]
        assert all(torch.equal(output, outputs[0]) for output in outputs)
        assert held(compared.alone) == held(assistant)
        before.append(held(assistant))
    assert (before[-1][:5] == before[1][:5]) == (suffix_cache_bytes == 2**20), "or the first text was dropped"
    assert len(asked) == 6 + 4 + 1, "each by the assistant, four by the cache alone, and one before to warm up"
    assert compared.alone.stats.total.draft_steps == 0
    assert compared.target_forwards == assistant.stats.total.rounds


def test_every_way_is_first_second_and_last_in_turn(target, draft, prompts):
    compared = Comparison(target, OnlineAssistant(draft, learn=False), 4, {})
    orders = [list(compared.decode(prompts[i], i)) for i in range(3)]
    for place in zip(*orders, strict=True):
        assert set(place) == {"online", "plain", "cache"}


@pytest.mark.parametrize("learn", comparison.BESIDE)
def test_what_learns_beside_serving_has_ended_before_others_are_decoded(target, draft, prompts, learn, monkeypatch):
    with OnlineAssistant(draft, learn=learn, update_interval=2) as assistant:
        compared, waited = Comparison(target, assistant, 4, {}), []
        state = type(assistant.learner).state
        monkeypatch.setattr(type(assistant.learner), "state", lambda self: (waited.append(None), state(self))[1])
        orders = [list(compared.decode(prompts[i], i)) for i in range(2)]
    assert orders == [["online", "plain", "cache"], ["online", "cache", "plain"]]
    assert len(waited) == 4


def test_the_cache_alone_has_a_cache_though_the_assistant_has_none(target, prompts):
    assistant = OnlineAssistant(grow_draft(target, (0,)), learn=False, suffix_cache=False)
    compared = Comparison(target, assistant, 4, {})
    output, _ = compared.decode(prompts[0])["online"]
    assert held(compared.alone)[1:-1] == output.tolist()
