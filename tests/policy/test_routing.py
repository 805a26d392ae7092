"""The router finds synthetic topics, and follows what is measured."""

import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_osd.policy import routing, topics
from hf_osd.policy.routing import Choice, TopicRouter, prompt_features
from hf_osd.policy.topics import MAX_TOPICS, Topics, two_groups

H = 32


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixture(count, n, seed=0, apart=4.0, drift=0.0):
    """`n` prompts of `count` topics in random order: features `(n, H)` and the topic of each. Means lie `apart` standard deviations apart, and drift by so much in all."""
    means = torch.linalg.qr(normal(H, H, seed=seed))[0][:count] * apart / 2**0.5 * 2
    which = torch.randint(count, (n,), generator=torch.Generator().manual_seed(seed + 1))
    along = torch.linspace(0, drift, n)[:, None]
    return means[which] + along * normal(1, H, seed=seed + 2) + normal(n, H, seed=seed + 3), which.tolist()


def purity(found, true):
    pairs = Counter(zip(found, true, strict=True))
    return sum(max(n for (topic, _), n in pairs.items() if topic == one) for one in set(found)) / len(true)


@settings(max_examples=8, deadline=None)
@given(count=st.integers(2, 6), seed=st.integers(0, 10**6))
def test_topics_are_found(count, seed):
    x, true = mixture(count, 60 * count, seed)
    router = TopicRouter(8, own_from=8)
    found = [router.route(one).topic for one in x]
    half = len(true) // 2
    assert purity(found[half:], true[half:]) > 0.95
    assert sum(n >= 8 for n in Counter(found[half:]).values()) <= count + 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 200), scale=st.sampled_from([1e-3, 1.0, 1e3]))
def test_one_topic_stays_one(seed, n, scale):
    router = TopicRouter(8, own_from=8)
    for x in normal(n, H, seed=seed) * scale:
        router.route(x)
    assert len(router.topics) <= 2
    assert len(router.routes) <= 2


def test_topics_are_followed_as_their_means_drift():
    x, true = mixture(3, 1500, drift=6.0)
    router = TopicRouter(8, own_from=8)
    found = [router.route(one).topic for one in x]
    assert purity(found[-300:], true[-300:]) > 0.95
    assert len(set(found[-300:])) <= 5


def test_a_new_topic_is_met_at_once():
    router = TopicRouter(8, own_from=8)
    for x in normal(40, H):
        first = router.route(x)
    there = normal(1, H, seed=7)[0] * 10
    choices = [router.route(there + x) for x in normal(10, H, seed=8)]
    assert choices[0].is_new
    assert not choices[1].is_new
    assert {choice.topic for choice in choices}.isdisjoint({first.topic})
    assert choices[0].route == first.route  # one prompt is no topic yet
    assert choices[-1].route != first.route
    assert [choice.parent for choice in choices if choice.parent is not None] == [first.route]


def test_the_pool_may_be_full():
    x, true = mixture(6, 400)
    router = TopicRouter(2, own_from=8)
    choices = [router.route(one) for one in x]
    assert len(router.routes) == 2
    assert {choice.route for choice in choices} == set(router.routes)
    assert len({choice.topic for choice in choices[200:]}) >= 6


def test_memory_is_bounded():
    router = TopicRouter(8, own_from=8)
    for i, x in enumerate(normal(1200, H) * 0.01):
        x[i % H] += 100.0 * (1 + i // H)
        router.route(x)
    assert len(router.topics) <= MAX_TOPICS
    assert len(router.routes) <= 8
    assert router.topics.keys() == router._topics.found.keys()
    assert len(router._topics._labels) == topics._KEPT


def test_a_topic_that_was_split_by_chance_is_joined_again():
    """Two topics become one, as their means do; the draft that has learnt more serves it."""
    x, true = mixture(2, 120)
    router = TopicRouter(8, own_from=8)
    for one in x:
        choice = router.route(one)
    assert len(router.routes) == 2
    taught = {name: router._routes[name].taught for name in router.routes}
    last = x[-1] * 0
    for one in normal(400, H, seed=9):
        choice = router.route(last + one)
    assert sum(topic.count >= 8 for topic in router._topics.found.values()) == 1
    assert choice.route == max(taught, key=taught.get)


def test_of_equal_distance_and_no_distance():
    router = TopicRouter(4, own_from=8)
    assert {router.route(torch.ones(H)) for _ in range(50)} == {
        Choice("route-0", 0, True),
        Choice("route-0", 0, False),
    }


@pytest.mark.parametrize(
    "features", [torch.zeros(2, H), torch.zeros(0), torch.full((H,), float("nan")), torch.tensor(1.0)]
)
def test_features_that_are_none_raise(features):
    with pytest.raises(ValueError, match="features"):
        TopicRouter(4, own_from=8).route(features)


def test_features_of_another_length_raise():
    router = TopicRouter(4, own_from=8)
    router.route(torch.zeros(H))
    with pytest.raises(ValueError, match=f"{H} numbers"):
        router.route(torch.zeros(H + 1))


@pytest.mark.parametrize("count", [0, -1, 1.5, True, None])
def test_no_routes_raise(count):
    with pytest.raises(ValueError, match="max_routes"):
        TopicRouter(count)
    with pytest.raises(ValueError, match="own_from"):
        TopicRouter(8, own_from=count)


def test_one_route_learns_from_all_topics_until_they_have_had_enough_prompts():
    x, true = mixture(2, 400)
    router, own = TopicRouter(8), {}
    for i, one in enumerate(x):
        choice = router.route(one)
        own.setdefault(choice.route, (i, choice.parent))
    assert set(router.topics.values()) == set(own) == {"route-0", "route-1"}
    opened, parent = own["route-1"]
    assert parent == "route-0"
    assert 128 <= true[: opened + 1].count(true[opened]) <= 136


def test_longer_features_are_projected_by_the_seed():
    x, true = mixture(3, 200)
    long = x @ normal(H, 3000, seed=5)
    found = [TopicRouter(8, seed=1, own_from=8) for _ in range(2)]
    same = [[router.route(one) for one in long] for router in found]
    assert same[0] == same[1]
    assert purity([choice.topic for choice in same[0]][100:], true[100:]) > 0.95
    assert found[0]._topics._kept.shape[1] == topics._LONGEST


def served(router, x, acceptance, tokens=64):
    """Route a prompt, and observe what `acceptance(route, topic)` gives for all routes."""
    choice = router.route(x)
    router.observe(choice.topic, {name: acceptance(name, choice) for name in router.routes}, tokens)
    return choice


def test_drafts_that_do_not_pay_become_one():
    x, _ = mixture(3, 2000)
    router, routes = TopicRouter(8, own_from=8), []
    for one in x:
        served(router, one, lambda name, choice: 0.5)
        routes.append(len(router.routes))
    assert sum(routes[1000:]) / 1000 < 1.5
    assert sum(router.topics[topic] is not None for topic in router.topics) >= 3


def test_drafts_that_pay_stay():
    x, true = mixture(3, 600)
    router = TopicRouter(8, own_from=8)
    choices = [served(router, one, lambda name, choice: 0.6 if name == choice.route else 0.5) for one in x]
    assert purity([choice.route for choice in choices[300:]], true[300:]) > 0.95


def test_one_draft_is_tried_at_a_time():
    """One that learns all other topics stays beside it, by which it is judged."""
    x, _ = mixture(5, 600)
    router = TopicRouter(8, own_from=8)
    for one in x:
        served(router, one, lambda name, choice: 0.5)
        assert sum(route.taught < routing._TAUGHT for route in router._routes.values()) <= 1


def test_a_topic_follows_the_better_draft():
    x, true = mixture(2, 400)
    router = TopicRouter(8, own_from=8)
    choices = [served(router, one, lambda name, choice: 0.7 if name == "route-0" else 0.4) for one in x]
    assert sum(choice.route == "route-0" for choice in choices) > 0.6 * len(x)
    assert "route-0" in router.routes
    assert len(router.routes) <= 2  # one is tried now and then


def test_a_topic_tries_a_draft_of_its_own_again_and_less_and_less():
    x, true = mixture(2, 3000)
    router, made = TopicRouter(8, own_from=8), []
    for one in x:
        served(router, one, lambda name, choice: 0.5)
        made.append(router._made)
    assert made[500] < made[-1] <= 12
    assert made[-1] - made[1500] <= 3


def test_a_topic_needs_evidence_to_move():
    x, _ = mixture(2, 200)
    router = TopicRouter(8, own_from=8)
    for one in x:
        router.route(one)
    topic, other = sorted(router.topics)[:2]
    before = router.topics[topic]
    better = {before: 0.4, router.topics[other]: 0.6}
    router.observe(topic, better, 64)
    assert router.topics[topic] == before
    for _ in range(40):
        router.observe(topic, better, 64)
    assert router.topics[topic] == router.topics[other]


def test_unknown_topics_and_routes_are_ignored_and_wrong_numbers_raise():
    router = TopicRouter(4, own_from=8)
    choice = router.route(torch.ones(H))
    router.observe(99, {choice.route: 0.5}, 10)
    router.observe(choice.topic, {"gone": 0.5}, 10)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="acceptance"):
            router.observe(choice.topic, {choice.route: wrong}, 10)
    with pytest.raises(ValueError, match="tokens"):
        router.observe(choice.topic, {choice.route: 0.5}, 0)


def test_merged_routes_serve_together():
    x, _ = mixture(3, 200)
    router = TopicRouter(8, own_from=8)
    for one in x:
        router.route(one)
    first, second, *_ = router.routes
    moved = [topic for topic, route in router.topics.items() if route == first]
    router.merge(first, second)
    assert first not in router.routes
    assert {router.topics[topic] for topic in moved} == {second}
    with pytest.raises(ValueError, match="no route 'nowhere'"):
        router.merge("nowhere", second)


def test_a_forgotten_route_is_replaced():
    x, _ = mixture(2, 200)
    router = TopicRouter(8, own_from=8)
    for one in x:
        router.route(one)
    for name in router.routes:
        router.forget(name)
    assert router.routes == ()
    choices = [router.route(one) for one in x[:50]]
    assert {choice.route for choice in choices} == set(router.routes)
    assert not set(router.routes) & {"route-0", "route-1"}
    with pytest.raises(ValueError, match="no route 'route-0'"):
        router.forget("route-0")


def test_a_forgotten_routes_topics_go_to_what_was_measured():
    x, _ = mixture(3, 300)
    router = TopicRouter(8, own_from=8)
    for one in x:
        served(router, one, lambda name, choice: 0.6 if name == choice.route else 0.3 if name == "route-1" else 0.2)
    lost = router.routes[-1]
    topic = next(topic for topic, route in router.topics.items() if route == lost)
    router.forget(lost)
    assert router.topics[topic] == "route-1"


@settings(max_examples=10, deadline=None)
@given(at=st.integers(0, 150), seed=st.integers(0, 100), length=st.sampled_from([H, 2500]))
def test_state_goes_round(at, seed, length, tmp_path_factory):
    x, _ = mixture(3, 200, seed)
    x = x @ normal(H, length)
    acceptance = lambda name, choice: 0.3 + 0.1 * ((len(name) + choice.topic + int(name[-1])) % 5)  # noqa: E731
    router = TopicRouter(4, seed=3, own_from=8)
    for one in x[:at]:
        served(router, one, acceptance)
    path = tmp_path_factory.mktemp("router") / "state.pt"
    torch.save(router.state(), path)
    again = TopicRouter(4, own_from=8)
    again.load_state(torch.load(path, weights_only=True))
    expected = [served(router, one, acceptance) for one in x[at:]]
    assert [served(again, one, acceptance) for one in x[at:]] == expected
    assert again.routes == router.routes


def test_state_is_json_but_for_tensors_and_apart_from_the_router():
    router = TopicRouter(4, own_from=8)
    for one in mixture(2, 60)[0]:
        served(router, one, lambda name, choice: 0.5)
    state = router.state()
    before = json.dumps(state, default=lambda tensor: tensor.tolist())
    router.route(torch.ones(H))
    assert json.dumps(state, default=lambda tensor: tensor.tolist()) == before
    with pytest.raises(ValueError, match="version 99"):
        router.load_state({**state, "version": 99})


def test_a_call_does_bounded_work(monkeypatch):
    """Looks are rare, and read few prompts; else a call is a few passes over the topics' means."""
    looks = []
    monkeypatch.setattr(topics, "two_groups", lambda z, limit: looks.append(len(z)) or two_groups(z, limit))
    found = Topics()
    x, _ = mixture(6, 2000)
    for one in x:
        found.assign(one)
    assert max(looks) <= topics._LOOK_AT
    assert len(looks) <= 2 * len(x) / topics._LOOK_EVERY + 2 * len(found.found) + 8


@settings(max_examples=50, deadline=None)
@given(n=st.integers(0, 64), seed=st.integers(0, 1000))
def test_two_groups_are_told_from_one(n, seed):
    z = normal(n, H, seed=seed)
    if n:
        assert sum(two_groups(z, 0.2) or []) <= n // 2
    if n >= 24:
        apart = z.clone()
        apart[: n // 2, 0] += 8
        side = two_groups(apart, 0.2)
        assert side is not None
        assert len(set(side[: n // 2])) == len(set(side[n // 2 :])) == 1


def test_prompt_features_are_the_mean_embedding_of_length_one():
    embeddings = normal(50, H).bfloat16()
    ids = torch.tensor([3, 4, 4])
    features = prompt_features(embeddings, ids)
    mean = embeddings[ids].float().mean(0)
    torch.testing.assert_close(features, mean / mean.norm())
    torch.testing.assert_close(prompt_features(embeddings, ids[None].int()), features)
    assert features.dtype == torch.float32
    assert not prompt_features(embeddings, ids[:0]).any()


def test_prompt_features_read_a_bounded_number_of_tokens():
    embeddings = normal(50, H)
    ids = torch.arange(5000) % 50
    read = ids[::5]
    assert len(read) <= routing._MAX_READ
    torch.testing.assert_close(
        prompt_features(embeddings, ids), embeddings[read].mean(0) / embeddings[read].mean(0).norm()
    )
