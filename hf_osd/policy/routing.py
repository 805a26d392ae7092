"""`TopicRouter` chooses which draft serves a prompt, of several that each learn their own traffic: by the prompt's topic, and by what was measured.

A *route* is a draft of the pool, a *topic* a cluster of prompts ([`hf_osd.policy.topics.Topics`]); a topic is served by one route, its home, and several topics may share
one. Topics get routes of their own one after another, while the pool has room. Whether that pays is measured: every draft is scored on the same request before it has learnt it (full
information, as in HedgeSpec, arXiv 2510.20064, so that nothing need be explored), and the topic follows the leader.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from hf_osd.policy.topics import Topics
from hf_osd.system.bounds import checked, whole

# Prompts of which a topic has its own route, unless it is the first: with fewer, one draft that learns from all topics was ahead of several (docs/results.md).
OWN_FROM = 128
# Scores are sums over tokens that fade by 1/e over so many, 64 answers of 64 tokens.
_FADE = 4096.0
# A topic's differences between routes are drawn towards those over all topics with the weight of so many tokens.
_PRIOR = 512.0
# Tokens of a topic on which a route must have been scored, and requests that the topic's own must have learnt, before the topic moves to that route.
_ENOUGH, _TAUGHT = 1024.0, 32
# A route is as good as a topic's own if its acceptance is no lower than by this: what twice the requests for one draft are worth.
_MARGIN = 0.01
# Standard deviation of the difference between two drafts' acceptance on one request, before enough were seen, and the tokens that this counts for.
_DEVIATION, _DEVIATION_PRIOR = 0.12, 512.0
_REQUEST = 64.0  # tokens of a request, in errors of means
# Requests of a topic that shares a route after which it tries one of its own (again); twice as many after each try that did not pay, at most 2^6 times.
_TRY_EVERY, _MAX_TRIES = 64, 6
# Tokens of a prompt that are read, evenly spaced where there are more.
_MAX_READ = 1024
_VERSION = 1


def prompt_features(embeddings: Tensor, token_ids: Tensor) -> Tensor:
    """Compute a prompt's features for [`TopicRouter.route`]: the mean of its tokens' input embeddings, scaled to length 1.

    Tokens that all prompts share, such as a chat template's, add the same to all: the router takes the mean over prompts away. They draw short prompts,
    whose means are noisy, towards that mean, and are therefore kept.

    Args:
        embeddings (`Tensor` float `(V, H)`): the target's input embeddings, `target.get_input_embeddings().weight`.
        token_ids (`Tensor` int `(L,)`): the prompt. Of more than 1024 tokens, evenly spaced ones are read.

    Returns:
        `Tensor` float32 `(H,)`: on the CPU; zeros for a prompt without tokens.
    """
    ids = token_ids.reshape(-1)
    ids = ids[:: max(-(-len(ids) // _MAX_READ), 1)].to(embeddings.device)
    with torch.no_grad():
        mean = embeddings.index_select(0, ids).sum(0, dtype=torch.float32)
        return (mean / mean.norm().clamp_min(1e-12)).cpu()


@dataclass(frozen=True)
class Choice:
    """The route of a prompt.

    Args:
        route: its name.
        topic (`int`): the prompt's topic.
        is_new (`bool`): whether the topic is met for the first time.
        parent (*optional*): for a route that is chosen for the first time, the one that served its topic until now, from whose weights it may start; `None` if there is none.
    """

    route: Hashable
    topic: int
    is_new: bool
    parent: Hashable | None = None


@dataclass
class _Score:
    """Acceptance of a route less that of a topic's home, over the topic's requests: faded sums over tokens."""

    tokens: float = 0.0
    gain: float = 0.0
    square: float = 0.0

    def add(self, gain: float, tokens: float, fade: float):
        self.tokens = fade * self.tokens + tokens
        self.gain = fade * self.gain + gain * tokens
        self.square = fade * self.square + gain * gain * tokens

    @property
    def mean(self) -> float:
        return self.gain / self.tokens if self.tokens else 0.0

    @property
    def error(self) -> float:
        """Estimates the standard error of the mean."""
        prior = _DEVIATION_PRIOR * _DEVIATION**2
        variance = (self.square - self.gain * self.mean + prior) / (self.tokens + _DEVIATION_PRIOR)
        return math.sqrt(max(variance, 0.0) * _REQUEST / max(self.tokens, _REQUEST))


@dataclass
class _Home:
    """Where a topic is served."""

    route: str | None = None  # `None` until it has one: the nearest topic's serves it
    near: int = -1  # the topic that was nearest when it opened
    met: bool = False
    waited: int = 0  # requests since it came to its route
    tries: int = 0  # routes of its own that did not pay
    scores: dict[str, _Score] = field(default_factory=dict)


@dataclass
class _Route:
    taught: int = 0  # requests that it served
    tokens: float = 0.0  # faded, as is the next
    accepted: float = 0.0
    parent: str | None = None  # until it is chosen

    @property
    def mean(self) -> float:
        return self.accepted / self.tokens if self.tokens else 0.0


class TopicRouter:
    """Routes prompts to drafts by topic. It holds no text, and knows neither models nor training; its memory is bounded. It is deterministic. Calls must come one at
    a time: a caller with threads holds a lock.

    Args:
        max_routes (`int`): routes at one time, at most.
        seed (`int`): of the projection of features that are longer than 2048.
        own_from (`int`): prompts of a topic from which it may have a route of its own.

    Raises:
        ValueError: if `max_routes` or `own_from` is below 1.
    """

    def __init__(self, max_routes: int, seed: int = 0, own_from: int = OWN_FROM):
        self.max_routes = checked("max_routes", max_routes, whole(1))
        self.seed, self.own_from = seed, checked("own_from", own_from, whole(1))
        self._topics = Topics(seed)
        self._homes: dict[int, _Home] = {}
        self._routes: dict[str, _Route] = {}
        self._made = 0

    @property
    def routes(self) -> tuple[str, ...]:
        """Names the routes that serve a topic. One that is no longer among them will not be chosen again."""
        return tuple(self._routes)

    @property
    def topics(self) -> dict[int, str | None]:
        """Maps each topic to its route; `None` for one that the nearest topic's route serves for now."""
        return {topic: home.route for topic, home in self._homes.items()}

    def route(self, features: Tensor) -> Choice:
        """Choose the route of a prompt.

        Args:
            features (`Tensor` float `(H,)`): as of [`prompt_features`].

        Raises:
            ValueError: if they are no vector of finite numbers, or of another length than those before.
        """
        assigned = self._topics.assign(features)
        topic = assigned.topic
        for number, near in assigned.opened:
            self._homes[number] = _Home(near=near)
        for gone, into in assigned.joined:
            self._join(self._homes.pop(gone), into)
        for number in self._homes.keys() - self._topics.found.keys():
            del self._homes[number]
        home = self._homes[topic]
        home.waited += 1
        if home.route is None or self._would_try(topic, home):
            self._settle(topic, home)
        self._retire()
        name = self._serving(topic)
        route = self._routes[name]
        choice = Choice(name, topic, not home.met, route.parent)
        home.met, route.parent = True, None
        route.taught += 1
        return choice

    def observe(self, topic: int, acceptance: Mapping[Hashable, float], tokens: int):
        """Record how drafts fared on one request, and move its topic to another route if that one is better, or as good and can be shared.

        Args:
            topic (`int`): the request's.
            acceptance (`Mapping[Hashable, float]`): the expected acceptance, 0 to 1, of each route's draft before it has learnt the request. Routes that are not in `routes` are
                ignored, and so is a request without the topic's own.
            tokens (`int`): over how many tokens.

        Raises:
            ValueError: if an acceptance is not between 0 and 1, or there are no tokens.
        """
        if wrong := {name: a for name, a in acceptance.items() if not 0 <= a <= 1}:
            raise ValueError(f"`acceptance` is {wrong}; it is between 0 and 1.")
        if not tokens > 0:
            raise ValueError(f"`tokens` is {tokens!r}; give those that the acceptance was measured over.")
        known = {name: a for name, a in acceptance.items() if name in self._routes}
        if topic not in self._homes or (serving := self._serving(topic)) not in known:
            return
        home, fade = self._homes[topic], math.exp(-tokens / _FADE)
        for name, a in known.items():
            route = self._routes[name]
            route.tokens, route.accepted = fade * route.tokens + tokens, fade * route.accepted + a * tokens
            if name != serving:
                home.scores.setdefault(name, _Score()).add(a - known[serving], tokens, fade)
        self._reconsider(home)
        self._retire()

    def merge(self, route: Hashable, into: Hashable):
        """Let `into` serve the topics of `route`, which serves none any more.

        Raises:
            ValueError: if there is no such route.
        """
        self._check(route, into)
        if route != into:
            for home in self._homes.values():
                if home.route == route:
                    _move(home, into)
            self._retire()

    def forget(self, route: Hashable):
        """Take a route away, whose draft is lost. Its topics go to the best that was measured for them, else to a new one.

        Raises:
            ValueError: if there is no such route.
        """
        self._check(route)
        for home in self._homes.values():
            if home.route == route:
                scored = {name: home.scores[name] for name in home.scores if name in self._routes and name != route}
                scored = {name: score.mean for name, score in scored.items() if score.tokens >= _ENOUGH}
                if scored:
                    _move(home, max(scored, key=scored.get))
                else:
                    home.route, home.waited, home.scores = None, 0, {}
        self._retire({route})

    def state(self) -> dict:
        """Return all that it has learnt: numbers, texts, lists, dicts and tensors."""
        return {
            "version": _VERSION,
            "max_routes": self.max_routes,
            "seed": self.seed,
            "made": self._made,
            "routes": {name: asdict(route) for name, route in self._routes.items()},
            "homes": {str(topic): asdict(home) for topic, home in self._homes.items()},
            "topics": self._topics.state(),
        }

    def load_state(self, state: Mapping):
        """Continue from what `state` returned; `max_routes` and `own_from` stay as they are, and apply to new routes.

        Raises:
            ValueError: if it was saved by another version.
        """
        if state.get("version") != _VERSION:
            raise ValueError(
                f"The router's state has version {state.get('version')!r}, and this hf_osd reads version {_VERSION}."
            )
        topics = Topics(state["seed"])
        topics.load_state(state["topics"])
        self._topics, self.seed, self._made = topics, state["seed"], state["made"]
        self._routes = {name: _Route(**values) for name, values in state["routes"].items()}
        self._homes = {}
        for topic, values in state["homes"].items():
            scores = {name: _Score(**score) for name, score in values["scores"].items()}
            self._homes[int(topic)] = _Home(**{**values, "scores": scores})

    def _check(self, *names: Hashable):
        if unknown := [name for name in names if name not in self._routes]:
            raise ValueError(f"There is no route {unknown[0]!r}; there are {', '.join(self._routes) or 'none yet'}.")

    def _serving(self, topic: int) -> str:
        """Name the route that serves a topic now: its own, or that of the topic it was nearest to, or of the nearest one."""
        home = self._homes[topic]
        if home.route is not None:
            return home.route
        near = self._homes.get(home.near)
        if near is not None and near.route is not None:
            return near.route
        among = [other for other, its in self._homes.items() if its.route is not None]
        return self._homes[self._topics.nearest(topic, among)].route

    def _settle(self, topic: int, home: _Home):
        """Give a topic a route of its own, if it is the first or has had enough prompts and there is room."""
        if self._routes and (self._topics.found[topic].count < self.own_from or not self._may_try()):
            return
        parent = self._serving(topic) if any(its.route is not None for its in self._homes.values()) else None
        name, self._made = f"route-{self._made}", self._made + 1
        self._routes[name] = _Route(parent=parent)
        _move(home, name)
        home.scores = {}

    def _join(self, gone: _Home, into: int):
        """Let a topic have the home of one that joined it, if the draft there has learnt more."""
        home = self._homes[into]
        taught = [-1 if name is None else self._routes[name].taught for name in (home.route, gone.route)]
        if taught[1] > taught[0]:
            gone.met, gone.near = home.met, home.near if home.near != into else -1
            self._homes[into] = gone

    def _may_try(self) -> bool:
        """Tell whether there is room for a route, and no other is being tried: a draft is judged beside one that goes on learning from all other topics, and if all
        topics tried at once there would be none."""
        return len(self._routes) < self.max_routes and all(route.taught >= _TAUGHT for route in self._routes.values())

    def _would_try(self, topic: int, home: _Home) -> bool:
        """Tell whether a topic that shares its route is to try one of its own."""
        if home.waited < _TRY_EVERY * 2**home.tries or not self._may_try():
            return False
        return any(its.route == home.route for other, its in self._homes.items() if other != topic)

    def _reconsider(self, home: _Home):
        """Move a topic to the best other route, if that one is better than its own, or no worse and its own would serve nobody else."""
        if home.route is None or self._routes[home.route].taught < _TAUGHT:
            return
        alone = sum(other.route == home.route for other in self._homes.values()) == 1
        best = None
        for name, score in home.scores.items():
            if score.tokens < _ENOUGH:
                continue
            general = self._routes[name].mean - self._routes[home.route].mean
            gain = (score.gain + _PRIOR * general) / (score.tokens + _PRIOR) - score.error
            if gain > (-_MARGIN if alone else 0.0) and (best is None or gain > best[0]):
                best = gain, name
        if best is not None:
            home.tries = min(home.tries + alone, _MAX_TRIES)
            _move(home, best[1])

    def _retire(self, lost: set[Hashable] = frozenset()):
        """Remove routes that serve no topic, and all scores of them."""
        used = {home.route for home in self._homes.values()} - lost
        for name in self._routes.keys() - used:
            del self._routes[name]
        for home in self._homes.values():
            home.scores = {name: score for name, score in home.scores.items() if name in self._routes}


def _move(home: _Home, to: str):
    """Let another route serve a topic; scores become differences to it."""
    new = home.scores.pop(to, None)
    if new is None:
        home.scores = {}
    else:
        for score in home.scores.values():
            score.gain -= new.mean * score.tokens
        if home.route is not None:
            home.scores[home.route] = _Score(new.tokens, -new.gain, new.square)
    home.route, home.waited = to, 0
