"""A static draft of another architecture beside the one that learns: who serves, who learns from it, and that nobody's output changes."""

from functools import partial

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_osd import OnlineAssistant, RoutedAssistant, grow_draft, grow_feature_draft
from hf_osd.policy.draft_choice import LEARNING, STATIC, DraftChoice

from .served import alone, in_threads

LEARNS = {"update_interval": 2, "learning_rate": 5e-3, "gate": False, "learning_budget": 1.0, "lookahead": "constant"}


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4)


def gpt2(vocab_size=64):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=128, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


@pytest.fixture
def heavy():
    return gpt2()


def prompts(count):
    random = torch.Generator().manual_seed(0)
    return [torch.randint(2, 64, (1, 8), generator=random) for _ in range(count)]


def served(assistant, target, count, **kwargs):
    """The drafts that served calls, each compared with plain decoding."""
    names = []
    for prompt in prompts(count):
        before = assistant._choice.calls
        output = target.generate(prompt, assistant_model=assistant, max_new_tokens=12, do_sample=False, **kwargs)
        assert torch.equal(output, alone(target, prompt, max_new_tokens=12, do_sample=False))
        names += [name for name, calls in assistant._choice.calls.items() if calls > before[name]]
    return names


@pytest.mark.parametrize("kind", ["grown", "feature"])
@pytest.mark.parametrize("learn", ["inline", "background"])
def test_both_serve_and_output_is_the_targets(target, heavy, kind, learn):
    draft = grow_feature_draft(target, seed=0) if kind == "feature" else grow_draft(target)
    kept = {name: p.clone() for name, p in heavy.named_parameters()}
    assistant = OnlineAssistant(draft, static_draft=heavy, **LEARNS, learn=learn, seed=0)
    assert set(served(assistant, target, 8)) == {STATIC, LEARNING}
    assert not assistant.serves
    assistant.flush()
    stats = assistant.stats
    assert (stats.total.requests, stats.failed_updates) == (8, 0)
    assert stats.updates
    taught = assistant.buffer.requests()
    assert len(taught) == (8 if kind == "grown" else assistant._choice.calls[LEARNING]), (
        "states come with its own calls alone"
    )
    assert all(torch.equal(p, kept[name]) for name, p in assistant._static.serving.active.named_parameters())
    assert "Of two drafts" in assistant.report()
    assistant.close()
    assert served(assistant, target, 1)


def test_the_faster_one_serves_and_the_other_is_tried_now_and_then(target, heavy):
    assistant = OnlineAssistant(grow_draft(target), static_draft=heavy, **LEARNS, seed=0)
    for name, seconds in ((STATIC, 1.0), (LEARNING, 4.0)) * 3:
        assistant._choice.choose()
        assistant._choice.observe(name, 100, seconds)
    assert served(assistant, target, 3) == [STATIC] * 3


def test_a_private_call_teaches_nobody(target, heavy):
    assistant = OnlineAssistant(grow_draft(target), static_draft=heavy, **LEARNS, seed=0)
    for prompt in prompts(4):
        target.generate(prompt, assistant_model=assistant.private(), max_new_tokens=4, do_sample=False)
    assert not assistant.flush()
    assert not assistant.stats.buffer_requests


def test_statistics_go_on_after_a_restart(target, heavy, tmp_path):
    assistant = OnlineAssistant(grow_draft(target), static_draft=heavy, **LEARNS, seed=0)
    served(assistant, target, 4)
    assistant.save_state(tmp_path)
    again = OnlineAssistant(grow_draft(target), static_draft=heavy, **LEARNS, seed=0)
    again.load_state(tmp_path)
    served(again, target, 4)
    assert again.stats.total.requests == 8


def test_it_cannot_serve_beside_no_draft(heavy):
    with pytest.raises(ValueError, match="no draft"):
        OnlineAssistant(static_draft=heavy)


@pytest.mark.parametrize("kind", ["grown", "adapter", "feature"])
@pytest.mark.parametrize("learn", ["inline", "background"])
def test_one_static_draft_serves_beside_all_routes(target, heavy, kind, learn):
    draft = grow_feature_draft(target, seed=0) if kind == "feature" else grow_draft(target)
    extra = {"adapter": "lora", "lora": 2} if kind == "adapter" else {}
    assistant = RoutedAssistant(draft, routes="named", static_draft=heavy, **LEARNS, **extra, learn=learn, seed=0)

    def switch_routes(seed):
        for i, prompt in enumerate(prompts(8)):
            view = assistant.route("ab"[(i + seed) % 2])
            output = target.generate(prompt, assistant_model=view, max_new_tokens=12, do_sample=False)
            assert torch.equal(output, alone(target, prompt, max_new_tokens=12, do_sample=False))

    assert not in_threads(*(partial(switch_routes, seed) for seed in range(2)))
    assistant.flush()
    stats, routes = assistant.stats, dict(assistant.pool.items())
    assert {name: one.total.requests for name, one in stats.by_route.items() if name != "default"} == {"a": 8, "b": 8}
    assert stats.failed_updates == 0
    for route in routes.values():
        assert all(route._choice.calls[name] >= 3 for name in (STATIC, LEARNING)), "each finds out for itself"
        taught = len(route.buffer.requests())
        assert taught == (route._choice.calls[LEARNING] if kind == "feature" else 8)
        assert stats.updates
    statics = [route._static.serving.active for route in routes.values()]
    shared = zip(*(model.parameters() for model in statics), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in shared), "one copy"
    assert routes["a"]._static.lookahead.costs is routes["b"]._static.lookahead.costs
    assert assistant.report().count("Of two drafts") == 2
    assistant.close()
    assert assistant.pool.peek("a")._static.closed


def test_each_route_is_served_by_what_is_faster_there(target, heavy):
    assistant = RoutedAssistant(grow_draft(target), routes="named", static_draft=heavy, **LEARNS, seed=0)
    rates = {"a": {STATIC: 1.0, LEARNING: 4.0}, "b": {STATIC: 4.0, LEARNING: 1.0}}
    for route, seconds in rates.items():
        choice = assistant.pool.get(route)._choice
        for name in (STATIC, LEARNING) * 3:
            choice.choose()
            choice.observe(name, 100, seconds[name])
    for route, faster in (("a", STATIC), ("b", LEARNING)):
        choice = assistant.pool.get(route)._choice
        before = choice.calls[faster]
        for prompt in prompts(3):
            target.generate(prompt, assistant_model=assistant.route(route), max_new_tokens=4, do_sample=False)
        assert choice.calls[faster] == before + 3


def test_the_router_learns_from_calls_of_the_static_draft(target, heavy, monkeypatch):
    seen = []
    monkeypatch.setattr(RoutedAssistant, "_observe", lambda self, feedback, label: seen.append(label))
    assistant = RoutedAssistant(grow_draft(target), max_routes=1, static_draft=heavy, **LEARNS, seed=0)
    for prompt in prompts(6):
        target.generate(prompt, assistant_model=assistant, max_new_tokens=6, do_sample=False)
    assistant.collect()
    [(name, route)] = assistant.pool.items()
    assert min(route._choice.calls.values()) == 3
    assert [label[0] for label in seen] == [name] * 6


def test_a_route_goes_on_counting_both_after_it_was_put_away(target, heavy, tmp_path):
    assistant = RoutedAssistant(
        grow_draft(target), routes="named", max_routes=1, pool_folder=tmp_path, static_draft=heavy, **LEARNS, seed=0
    )
    for route in ("a", "b", "a"):
        for prompt in prompts(4):
            target.generate(prompt, assistant_model=assistant.route(route), max_new_tokens=4, do_sample=False)
        assistant.flush()
    assert {name: assistant.stats.by_route[name].total.requests for name in "ab"} == {"a": 8, "b": 4}


def test_a_route_stays_while_its_static_draft_serves(target, heavy):
    assistant = RoutedAssistant(grow_draft(target), routes="named", max_routes=1, static_draft=heavy, **LEARNS)
    [prompt], names = prompts(1), []

    class Other:
        """Asks another route in the middle of a call."""

        def put(self, value):
            names.append([name for name, _ in assistant.pool.items()])
            assistant.pool.get("b")

        def end(self):
            pass

    target.generate(prompt, assistant_model=assistant.route("a"), streamer=Other(), max_new_tokens=4, do_sample=False)
    assert assistant.pool.peek("a")._choice.calls[STATIC] == 1
    assert names[-1] == ["a", "b"]


def test_a_saved_draft_loads_beside_a_static_one(target, heavy, tmp_path):
    OnlineAssistant(grow_draft(target)).save_pretrained(tmp_path / "one")
    assistant = OnlineAssistant.from_pretrained(tmp_path / "one", static_draft=heavy)
    assert set(served(assistant, target, 4)) == {STATIC, LEARNING}
    RoutedAssistant(grow_draft(target), routes="named").save_pretrained(tmp_path / "pool")
    routed = RoutedAssistant.from_pretrained(tmp_path / "pool", static_draft=heavy)
    assert set(served(routed.pool.get("a"), target, 4)) == {STATIC, LEARNING}


@pytest.mark.parametrize("make", [OnlineAssistant, RoutedAssistant])
@pytest.mark.parametrize(
    ("static", "settings", "says"),
    [
        (lambda: gpt2(), {"learn": "process"}, "process"),
        (lambda: "gpt2", {}, "give a model"),
        (lambda: _t5(), {}, "causal LM only"),
        (lambda: gpt2(40), {}, "a vocabulary of 40 tokens and `draft` one of 64"),
    ],
)
def test_what_cannot_stand_beside_a_draft(target, make, static, settings, says):
    with pytest.raises(ValueError, match=says):
        make(grow_draft(target), static_draft=static(), **settings)


def _t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0))


@pytest.mark.parametrize("faster", [STATIC, LEARNING])
def test_trials_of_the_slower_draft_cost_a_bounded_share(faster):
    choice, spent, calls = DraftChoice(), 0.0, []
    for _ in range(2000):
        name = choice.choose()
        calls.append(name)
        seconds = 1.0 if name == faster else 3.0
        choice.observe(name, 50, seconds)
        spent += seconds
    slow = len([name for name in calls if name != faster])
    assert slow > 2
    assert 2 * slow / spent < 0.015
    for _ in range(400):  # the other becomes the faster one
        name = choice.choose()
        choice.observe(name, 50, 3.0 if name == faster else 1.0)
    assert choice.choose() != faster
