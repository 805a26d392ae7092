"""Several drafts behind one `assistant_model`: who serves a call, who learns from it, and that nobody's output changes."""

from functools import partial

import pytest
import torch

from hf_osd import OnlineAssistant, RoutedAssistant, grow_draft, grow_feature_draft

from ..served import in_threads
from .calls import GREEDY, LEARNS, prompts, serve


def switch_routes(target, assistant, seed):
    """Six calls, of one route and the other in turn."""
    for i, prompt in enumerate(prompts(6, seed=seed)):
        serve(target, assistant.route("ab"[(i + seed) % 2]), prompt)


@pytest.mark.parametrize("kind", ["grown", "adapter", "feature"])
def test_each_route_learns_its_own_calls_and_output_is_the_targets(target, kind):
    draft = grow_feature_draft(target, seed=0) if kind == "feature" else grow_draft(target)
    extra = {"adapter": "lora", "lora": 4} if kind == "adapter" else {}
    assistant = RoutedAssistant(draft, routes="named", lookahead="constant", **LEARNS, **extra)
    for prompt in prompts(5):
        for name in ("a", "b"):
            serve(target, assistant.route(name), prompt)
    serve(target, assistant, prompts(1)[0])
    assistant.flush()
    stats = assistant.stats
    assert {name: one.total.requests for name, one in stats.by_route.items()} == {"default": 1, "a": 5, "b": 5}
    assert [stats.by_route[name].updates for name in ("default", "a", "b")] == [1, 3, 3]
    assert (stats.updates, stats.failed_updates, stats.total.requests) == (7, 0, 11)
    a, b = (dict(assistant.pool.peek(name).serving.weights()) for name in "ab")
    untouched = OnlineAssistant(draft, lookahead="constant", **LEARNS, **extra).serving.weights()
    assert any(not torch.equal(weight, a[name]) for name, weight in untouched)
    assert all(text in assistant.report() for text in ("Route a:", "Route b:", "Route default:"))
    assert a.keys() == b.keys()


def test_a_routes_view_has_the_routes_own_figures(target):
    assistant = RoutedAssistant(grow_draft(target), routes="named", max_routes=1, **LEARNS)
    view = assistant.route("a")
    assert view.stats.total.requests == 0
    assert "no call yet" in view.report()
    for prompt in prompts(2):
        serve(target, view.tenant("t"), prompt)
    serve(target, assistant, prompts(1)[0])
    assistant.collect()
    assert (view.stats.total.requests, assistant.stats.total.requests) == (2, 3)
    assert view.report() == assistant.pool.peek("a").report()
    serve(target, assistant.route("b"), prompts(1)[0])
    assert view.stats.total.requests == 2
    assert "put away" in view.report()
    assert view.pool is assistant.pool


def test_routes_share_what_none_has_changed(target):
    assistant = RoutedAssistant(grow_draft(target), routes="named", **LEARNS)
    a, b = (assistant.pool.get(name) for name in "ab")
    shared = zip(a.serving.active.parameters(), b.serving.active.parameters(), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in shared)
    assert a.texts is b.texts
    assert a.lookahead.costs is b.lookahead.costs
    assert a.lookahead.positions is not b.lookahead.positions
    assert assistant.pool.nbytes == 0


@pytest.mark.parametrize("kind", ["adapter", "frozen embeddings", "ensemble"])
def test_learners_of_routes_have_one_float32_copy_of_what_does_not_train(tiny_llama, kind):
    draft = grow_draft(tiny_llama(layers=4).bfloat16())
    extra = {"adapter": {"adapter": "lora", "lora": 2}, "ensemble": {"ensemble": [1.0, 2.0]}}.get(kind, {})
    settings = {**LEARNS, "freeze_embeddings": True, "learner_dtype": "float32", **extra}
    assistant = RoutedAssistant(draft, routes="named", **settings)
    students = [assistant.pool.get(name).learner.student for name in "ab"]
    students = [one for student in students for one in getattr(student, "students", [student])]
    read = [dict(one.module.named_parameters()) for one in students]
    assert all(p.dtype == torch.float32 for p in read[0].values())
    for name, p in read[0].items():
        shared = {weights[name].data_ptr() for weights in read}
        assert len(shared) == (len(students) if name in students[0].trainable else 1)
        assert p.data_ptr() not in {weight.data_ptr() for weight in draft.parameters()}


def test_adapters_that_do_not_fit_serve_unmerged_and_output_is_the_targets(target, tmp_path):
    draft = grow_draft(target)
    settings = {"adapter": "lora", "lora": 2, "lookahead": "constant"} | LEARNS
    assistant = RoutedAssistant(draft, routes="named", **settings)
    for prompt in prompts(2):
        for name in "ab":
            serve(target, assistant.route(name), prompt)
    assistant.flush()
    assistant.pool.max_bytes = assistant.pool.nbytes - 1

    assert not in_threads(*(partial(switch_routes, target, assistant, seed) for seed in range(2)))
    assistant.flush()
    assistant.pool.get("b")
    drafts = {name: member.serving for name, member in assistant.pool.items()}
    learnt = sum(weight.nbytes for _, weight in drafts["a"].weights())
    [rests] = [name for name, serving in drafts.items() if serving.own_bytes() == learnt]
    serve(target, assistant.route(rests), prompts(1)[0])
    assistant.collect()
    assert assistant.stats.by_route[rests].last.drafted_by["draft"] > 0
    assert assistant.stats.failed_updates == 0
    assert drafts[rests].own_bytes() == learnt
    assistant.save_route(rests, tmp_path)
    saved = OnlineAssistant.from_pretrained(tmp_path).serving.active
    merged = dict(drafts[rests].plain().named_parameters())
    assert all(torch.equal(p, merged[name]) for name, p in saved.named_parameters())
    assert any(not torch.equal(p, merged[name]) for name, p in draft.named_parameters())


def test_routes_share_an_adapters_beginning_and_no_route_takes_the_base_from_others(target):
    assistant = RoutedAssistant(grow_draft(target), routes="named", adapter="lora", lora=2, **LEARNS)
    a, b = (assistant.pool.get(name) for name in "ab")
    assert a.adapter is b.adapter
    with pytest.raises(ValueError, match="other routes have learnt"):
        a.refresh(grow_draft(target, (1, 2)))


def test_text_is_shared_by_routes_and_kept_apart_by_tenants(target):
    assistant = RoutedAssistant(grow_draft(target), routes="named", draft_cost=10.0, learn=False)
    prompt = prompts(1)[0]
    serve(target, assistant.route("a"), prompt)
    serve(target, assistant.route("b").tenant("t"), prompt)
    serve(target, assistant.route("b"), prompt)
    assistant.collect()
    assert assistant.stats.by_route["b"].last.drafted_by["cache"] > 0


def test_private_calls_teach_no_route(target):
    assistant = RoutedAssistant(grow_draft(target), **LEARNS)
    for prompt in prompts(4):
        serve(target, assistant.route("a").private(), prompt)
        serve(target, assistant.private(), prompt)
    assert not assistant.flush()
    assert assistant.stats.buffer_requests == 0
    assert not assistant.router.routes


def test_a_tenant_may_be_a_route(target):
    assistant = RoutedAssistant(grow_draft(target), tenants_are_routes=True, **LEARNS)
    serve(target, assistant.tenant("acme"), prompts(1)[0])
    assert assistant.stats.by_route["acme"].total.requests == 1
    with pytest.raises(ValueError, match="tenant's name is 7"):
        assistant.tenant(7)


def test_topics_get_routes_of_their_own_and_begin_with_their_parents_weights(target):
    assistant = RoutedAssistant(grow_draft(target), max_routes=4, topic_requests=8, **LEARNS)
    for one, other in zip(prompts(28, 2, 18), prompts(28, 48, 64, seed=1), strict=True):
        serve(target, assistant, one, max_new_tokens=4)
        serve(target, assistant, other, max_new_tokens=4)
    assistant.flush()
    assert len(assistant.pool) >= 2
    by_route = {name: stats for name, stats in assistant.stats.by_route.items() if name != "default"}
    assert sum(stats.total.requests for stats in by_route.values()) == 56
    assert all(stats.failed_updates == 0 for stats in by_route.values())


def test_routes_switched_in_threads_while_they_learn(target):
    assistant = RoutedAssistant(grow_draft(target), routes="named", lookahead="constant", **LEARNS)
    assert not in_threads(*(partial(switch_routes, target, assistant, seed) for seed in range(3)))
    assistant.flush()
    assert assistant.stats.total.requests == 18
    assert assistant.stats.failed_updates == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"routes": "none"}, "routes"),
        ({"max_routes": 0}, "max_routes"),
        ({"topic_requests": 0}, "topic_requests"),
        ({"pool_bytes": 0}, "pool_bytes"),
        ({"learn": "process"}, "process"),
    ],
)
def test_what_it_cannot_be_made_with(target, arguments, says):
    with pytest.raises(ValueError, match=says):
        RoutedAssistant(grow_draft(target), **arguments)


def test_a_route_needs_a_name(target):
    assistant = RoutedAssistant(grow_draft(target), learn=False)
    for name in ("", None, 3):
        with pytest.raises(ValueError, match="route's name"):
            assistant.route(name)
    with pytest.raises(ValueError, match="needs a draft"):
        RoutedAssistant(None)


def test_a_closed_one_still_drafts(target):
    with RoutedAssistant(grow_draft(target), lookahead="constant", **LEARNS) as assistant:
        serve(target, assistant.route("a"), prompts(1)[0])
    serve(target, assistant.route("a"), prompts(1)[0])
    assert assistant.stats.by_route["a"].last.drafted_by["draft"] > 0


def test_a_route_that_no_topic_has_any_more_is_let_go(target):
    assistant = RoutedAssistant(grow_draft(target), **LEARNS)
    first, second = prompts(2)
    serve(target, assistant, first)
    [name] = assistant.router.routes
    assistant.router.forget(name)
    serve(target, assistant, second)
    assert name not in assistant.pool
    assert len(assistant.pool) == 1
    assert assistant.stats.total.requests == 2


@pytest.mark.parametrize("sampled", [False, True])
def test_drafts_are_scored_on_requests_that_none_has_learnt(target, sampled):
    assistant = RoutedAssistant(grow_draft(target), max_routes=4, topic_requests=8, **LEARNS)
    seen = []
    observe = assistant.router.observe
    assistant.router.observe = lambda topic, acceptance, tokens: (
        seen.append((topic, dict(acceptance), tokens)),
        observe(topic, acceptance, tokens),
    )
    for one, other in zip(prompts(28, 2, 18), prompts(28, 48, 64, seed=1), strict=True):
        for prompt in (one, other):
            target.generate(prompt, assistant_model=assistant, max_new_tokens=6, do_sample=sampled)
    assistant.flush()
    assert seen
    assert all(len(acceptance) >= 2 and min(acceptance.values()) >= 0 for _, acceptance, _ in seen)
    stats = assistant.stats
    assert stats.routing_seconds > 0
    by_route = sum(one.learning_seconds for one in stats.by_route.values())
    assert stats.learning_seconds == pytest.approx(by_route + stats.routing_seconds)
    assert stats.to_dict()["routing_seconds"] == stats.routing_seconds
    assert "scored" in assistant.report()


def test_in_a_job_of_several_processes_it_does_not_learn(target, monkeypatch):
    from hf_osd.distill.ranks import RankGroup

    monkeypatch.setattr(RankGroup, "of_job", classmethod(lambda cls: type("Two", (), {"size": 2})()))
    with pytest.raises(ValueError, match="several processes"):
        RoutedAssistant(grow_draft(target), learn=True)


def test_a_route_that_serves_a_call_stays(target):
    assistant = RoutedAssistant(grow_draft(target), routes="named", max_routes=1, **LEARNS)
    [prompt] = prompts(1)

    class Other:
        """Asks another route in the middle of a call."""

        def __init__(self):
            self.asked = False

        def put(self, value):
            if not self.asked:
                self.asked = True
                serve(target, assistant.route("b"), prompt)

        def end(self):
            pass

    target.generate(prompt, assistant_model=assistant.route("a"), streamer=Other(), **GREEDY)
    assistant.collect()
    assert assistant.stats.total.requests == 2
    assert assistant.stats.buffer_requests == 2


def test_routes_learn_in_turn_beside_traffic(target):
    """Waiting for another route's learner is not taken for work, after which a learner rests for long."""
    settings = {**LEARNS, "learn": "background", "learning_budget": 0.5}
    assistant = RoutedAssistant(grow_draft(target), routes="named", **settings)
    pauses = []
    for name in "abc":
        throttle = assistant.pool.get(name).learner.throttle
        original = throttle.begin
        throttle.begin = lambda name=name, original=original: (pauses.append(name), original())[1]
    for prompt in prompts(12):
        for name in "abc":
            serve(target, assistant.route(name), prompt)
    assistant.flush()
    assert all(stats.updates >= 1 for name, stats in assistant.stats.by_route.items() if name in "abc")
    assistant.close()
