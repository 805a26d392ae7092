"""`RoutedAssistant` serves with several drafts, each of which learns its own traffic: a topic, a language, a tenant."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hf_osd.assistant import OnlineAssistant
from hf_osd.config import OnlineConfig
from hf_osd.distill.ranks import RankGroup
from hf_osd.distill.scoring import judge_served
from hf_osd.generation.checks import check_call
from hf_osd.generation.shared_parts import SharedParts
from hf_osd.generation.view import AssistantView
from hf_osd.metrics.routed_stats import RoutedStats
from hf_osd.metrics.stats import Stats
from hf_osd.models.copies import fingerprint
from hf_osd.models.pool import DEFAULT, DraftPool
from hf_osd.policy.routing import OWN_FROM, Choice, TopicRouter, prompt_features
from hf_osd.saving.routes import SavableRoutes
from hf_osd.system.bounds import checked, whole
from hf_osd.system.forks import released

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.feedback.feedback import Feedback
    from hf_osd.generation.candidates import OnlineCandidateGenerator
    from hf_osd.generation.request import GenerateRequest

logger = logging.getLogger(__name__)

# All drafts are scored on every so many-th request that a router may learn from, as long as that takes no more than this share of serving.
_SCORE_EVERY, _SCORE_SHARE = 4, 0.02
_NO_TOPIC = -1


class RouteView(AssistantView):
    """Opens a [`RoutedAssistant`]'s calls on one route. Made by [`RoutedAssistant.route`]; pass it as `assistant_model`. `stats` and `report()` are the route's own; all
    other attributes are the assistant's."""

    def __init__(self, assistant: RoutedAssistant, route: str, tenant: Hashable = None, private: bool = False):
        super().__init__(assistant, tenant, private)
        self._route = route

    def open_call(self, request: GenerateRequest) -> OnlineCandidateGenerator:
        return self._assistant.open_call(request, tenant=self._tenant, private=self._private, route=self._route)

    def tenant(self, name: Hashable) -> RouteView:
        return RouteView(self._assistant, self._route, name, self._private)

    def private(self) -> RouteView:
        return RouteView(self._assistant, self._route, self._tenant, private=True)

    @property
    def stats(self) -> Stats:
        """Returns the route's statistics, of all its tenants; nothing was counted on one that has served no call yet."""
        return self._assistant.stats.by_route.get(self._route, Stats())

    def report(self) -> str:
        """Describes the route in a few lines, see [`OnlineAssistant.report`]."""
        return self._assistant.report_of(self._route)


class RoutedAssistant(SavableRoutes):
    """Assists `generate` with several drafts that begin as one and each learn the traffic of their route (arXiv 2310.07177, section 4.3, "query routing").

    ```python
    assistant = RoutedAssistant(draft)                                              # a route for each topic that is found
    target.generate(**inputs, assistant_model=assistant)
    target.generate(**inputs, assistant_model=assistant.route("sql"))               # or one that you name
    ```

    A route is all that an [`OnlineAssistant`] has of its own: the serving weights, a learner with its buffer and gate, estimates of acceptance. The routes share what is
    common: the weights that no route has changed, the suffix cache, measured costs. One of them learns at a time. Changing the route of a call moves no weight, unless the
    route had been put away. Output is the target's own on every route.

    Args:
        draft (`PreTrainedModel`): as for `OnlineAssistant`. All routes begin with it; a topic's begins with the weights of the route that served it until then.
        config ([`OnlineConfig`], *optional*): settings of each route; `learn="process"` is not possible. `adapter="lora"` makes a route take little memory.
        routes (`str`): `"topics"` finds the route of each prompt by its topic ([`hf_osd.policy.routing.TopicRouter`]) where the call names none; `"named"` serves such calls on the route
            `"default"`.
        max_routes (`int`): routes at one time, at most, the default route not counted. The one that was used least recently is put away for another.
        topic_requests (`int`): requests of a topic from which it may have a route of its own; until then it shares one, which learns from all that it serves.
        pool_bytes (`int`, *optional*): memory for what routes add to the draft as it came, by estimate ([`hf_osd.models.pool.route_bytes`]); no bound if left out.
        pool_folder (*optional*): where to put away routes that do not fit: learnt weights and the learner's state, and no text. Without one they are dropped, and begin anew when asked for again.
        tenants_are_routes (`bool`): serve a tenant's calls on a route of that name.
        static_draft (`PreTrainedModel`, *optional*): as for `OnlineAssistant`; one copy serves beside all routes. Each route finds out for itself which of the two is faster, for its
            draft and its prompts are its own, and its static calls teach its own draft.
        **overrides: single fields of the config.

    Raises:
        ValueError: as for `OnlineAssistant`, or if an argument has a value that it cannot have.
    """

    def __init__(
        self,
        draft: PreTrainedModel,
        config: OnlineConfig | None = None,
        *,
        routes: str = "topics",
        max_routes: int = 8,
        topic_requests: int = OWN_FROM,
        pool_bytes: int | None = None,
        pool_folder: str | None = None,
        tenants_are_routes: bool = False,
        static_draft: PreTrainedModel | None = None,
        **overrides,
    ):
        if draft is None:
            raise ValueError(
                "A RoutedAssistant needs a draft to route to; OnlineAssistant() serves from the suffix cache alone."
            )
        if routes not in ("topics", "named"):
            raise ValueError(f"`routes` is {routes!r}; choose 'topics' or 'named'.")
        self.max_routes = checked("max_routes", max_routes, whole(1))
        self.topic_requests = checked("topic_requests", topic_requests, whole(1))
        self.osd_config = config = OnlineConfig.of(config, overrides)
        if config.learn == "process":
            raise ValueError(
                "`learn` is 'process', and a process of its own for each route would take as many cores and copies. Choose learn='background' or 'inline'."
            )
        if config.learns and RankGroup.of_job().size > 1:
            raise ValueError(
                "This is one of several processes of a job, which would have to learn the same routes at the same moments. Use an OnlineAssistant there, or learn=False."
            )
        self.tenants_are_routes = tenants_are_routes
        self._lock = released(threading.RLock())
        shared = SharedParts.of(draft, config).with_static(static_draft, config)
        self._shared = replace(shared, learning=released(threading.Lock()), busy=self._serves, frozen={}, adapters={})
        self.router = TopicRouter(max_routes, config.seed or 0, topic_requests) if routes == "topics" else None
        self.pool = DraftPool(
            self._make,
            max_routes,
            pool_bytes,
            pool_folder,
            self._closing,
            busy=lambda assistant: assistant.serves,
            base=fingerprint(self._shared.draft.parameters()),
            resumed=self._resumed,
        )
        self._stats_before: dict[str, Stats] = {}  # of routes that were put away
        self._topical: set[str] = set()  # names that the router has given
        self._scored = Counter()
        self._score_seconds = 0.0
        self.closed = False
        self._default = self._make(DEFAULT, None)
        static = shared.static and replace(shared.static, lookahead=self._default._static.lookahead)
        self._shared = replace(self._shared, lookahead=self._default.lookahead, static=static)

    # Attributes that transformers reads on an assistant model.

    @property
    def config(self):
        """Returns the draft's config. The [`OnlineConfig`] is `osd_config`."""
        return self._default.config

    @property
    def generation_config(self):
        return self._default.generation_config

    @property
    def device(self) -> torch.device:
        return self._default.device

    @property
    def dtype(self) -> torch.dtype:
        return self._default.dtype

    def _supports_logits_to_keep(self) -> bool:
        return self._default._supports_logits_to_keep()

    def generate(self, *args, **kwargs):
        """Generates with the default route's draft alone, as [`OnlineAssistant.generate`] does."""
        return self._default.generate(*args, **kwargs)

    def warn_plain_decoding(self, target: PreTrainedModel, why: str):
        """Warns, once, that calls of `target` get no drafts."""
        self._default.warn_plain_decoding(target, why)

    # Serving.

    def route(self, name: str) -> RouteView:
        """Returns a view whose calls are served, and learnt, on the route of this name; it is made when it is first used.

        Raises:
            ValueError: if the name is no text, or empty.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"The route's name is {name!r}; give a text, such as 'sql'.")
        return RouteView(self, name)

    def tenant(self, name: Hashable) -> AssistantView:
        """Returns a view for one tenant's calls: its text in the suffix cache is never proposed to others. With `tenants_are_routes` it is served on a route of its own."""
        if self.tenants_are_routes and not isinstance(name, str):
            raise ValueError(f"The tenant's name is {name!r}; where tenants are routes, give a text.")
        return AssistantView(self, name)

    def private(self) -> AssistantView:
        """Returns a view for calls of which nothing is kept. Without a name of a route they are served on the default route, or on that of the tenant: a router learns nothing from them."""
        return AssistantView(self, private=True)

    def open_call(
        self, request: GenerateRequest, *, tenant: Hashable = None, private: bool = False, route: str | None = None
    ) -> OnlineCandidateGenerator:
        """Opens one generate call on its route; the seam calls it.

        Raises:
            ValueError: if assisted generation or hf_osd cannot serve the call; nothing has run by then.
        """
        check_call(request, self._default.serving.active)  # before a router counts it
        with self._lock:
            topic, parent = _NO_TOPIC, None
            if route is None and self.tenants_are_routes and tenant is not None:
                route = tenant
            by_topic = route is None and self.router is not None and not private
            if by_topic and (features := _features_of(request)) is not None:
                choice = self.choose(features)
                route, topic, parent = choice.route, choice.topic, choice.parent
            assistant = self.member(route or DEFAULT, parent)
        return assistant.open_call(request, tenant=tenant, private=private, label=(route, topic))

    def choose(self, features: torch.Tensor) -> Choice:
        """Lets the router choose the route of a prompt by its features ([`prompt_features`]), and lets drafts go whose topics have all gone to another route."""
        with self._lock:
            choice = self.router.route(features)
            self._topical.add(choice.route)
            for name in self._topical - set(self.router.routes):
                self._topical.remove(name)
                self.pool.drop(name)
            return choice

    def keep_routes(self, saved: Collection[str]):
        """Lets the router forget routes of which no weights are left: neither saved nor put away."""
        for name in self.router.routes:
            if name in self.router.routes and name not in saved and not self.pool.has_put_away(name):
                self.router.forget(name)
        self._topical = set(self.router.routes)

    def member(self, name: str, parent: str | None = None) -> OnlineAssistant:
        """Finds the assistant of a route, or makes it, with the weights of its `parent` if that is in memory."""
        with self._lock:
            if name == DEFAULT:
                return self._default
            known = name in self.pool
            assistant = self.pool.get(name)
            if not known and parent is not None and parent in self.pool and not assistant.serving.version:
                assistant.take_weights(dict(self.pool.peek(parent).serving.weights()))
            return assistant

    def _make(self, name: str, weights: dict[str, torch.Tensor] | None) -> OnlineAssistant:
        """Makes the assistant of a route, with learnt weights if it has some."""
        assistant = OnlineAssistant.of_parts(self.osd_config, self._shared)
        if weights is not None:
            assistant.take_weights(weights)
        if self.router is not None:
            assistant.tell(self._observe)
        return assistant

    def _resumed(self, name: str, assistant: OnlineAssistant, tensors: dict[str, torch.Tensor], values: dict) -> bool:
        """Lets a route go on learning from where it was put away, and counting; `False` if it cannot."""
        if assistant.learner is None:
            return False
        try:
            assistant.learner.load_state(tensors, values)
            assistant.learner.serve()
        except (ValueError, LookupError, TypeError) as error:
            logger.warning("Route %r goes on from its weights, with a new learner: %s", name, error)
            return False
        if (before := self._stats_before.pop(name, None)) is not None:  # the learner goes on counting
            assistant.count_from(Stats.from_state(before.state()))
        return True

    def _closing(self, name: str, assistant: OnlineAssistant, kept: bool):
        """Lets a route go that is put away (`kept`) or dropped."""
        assistant.collect()
        before = self._stats_before.get(name)
        self._stats_before[name] = assistant.stats if before is None else RoutedStats.of([before, assistant.stats])
        assistant.close()
        if not kept and self.router is not None and name in self.router.routes:
            self.router.forget(name)

    @torch.autocast("cpu", enabled=False)
    def _observe(self, feedback: Feedback, label: tuple[str | None, int] | None):
        """Scores all drafts on a request that none of them has learnt, now and then, and lets the router know."""
        name, topic = label or (None, _NO_TOPIC)
        if topic == _NO_TOPIC:
            return
        self._scored[name] += 1
        served = sum(assistant._stats.total.seconds for _, assistant in self._assistants())
        if self._scored[name] % _SCORE_EVERY or self._score_seconds > _SCORE_SHARE * served or len(self.pool) < 2:
            return
        began = time.perf_counter()
        try:
            acceptance = self.score_routes(feedback)
        except Exception:  # out of memory, say: a figure less, and no reason to break the user's call
            logger.exception("The drafts could not be scored on a request.")
            return
        finally:
            self._score_seconds += time.perf_counter() - began
        with self._lock:
            if acceptance and topic in self.router.topics:
                self.router.observe(topic, acceptance, len(feedback))

    def score_routes(self, feedback: Feedback) -> dict[str, float]:
        """Scores the draft of each of the router's routes that is in memory on a request: its mean expected acceptance there, 0 to 1."""
        with self._lock:
            routes = [(route, self.pool.peek(route)) for route in self.router.routes if route in self.pool]
        acceptance = {}
        for route, assistant in routes:
            [judged] = judge_served(assistant.serving, [feedback])
            known = judged.overlap[~judged.overlap.isnan()]
            if len(known):
                acceptance[route] = float(known.mean().clamp(0, 1))
        return acceptance

    # Learning and figures.

    def _assistants(self) -> Iterator[tuple[str, OnlineAssistant]]:
        yield DEFAULT, self._default
        yield from list(self.pool.items())

    def _serves(self) -> bool:
        """Tells whether any route serves a call; takes no lock."""
        return any(assistant.serves for _, assistant in self._assistants())

    def _each(self, do: Callable[[OnlineAssistant], bool]) -> bool:
        with self._lock:
            assistants = [assistant for _, assistant in self._assistants()]
        done = [do(assistant) for assistant in assistants]
        return any(done)

    def collect(self):
        """Collects statistics and feedback of the calls that have ended, on all routes."""
        self._each(OnlineAssistant.collect)

    def update(self, force: bool = False) -> bool:
        """Learns on each route on which an update is due. Returns `True` if weights of any were refreshed."""
        return self._each(lambda assistant: assistant.update(force))

    def flush(self) -> bool:
        """Learns from all new feedback of all routes now. Returns `True` if weights of any were refreshed."""
        return self._each(OnlineAssistant.flush)

    def close(self):
        """Stops learning on all routes. The drafts go on drafting with fixed weights."""
        self._each(OnlineAssistant.close)
        self.closed = True

    def __enter__(self) -> RoutedAssistant:
        return self

    def __exit__(self, *exception):
        self.close()

    @property
    def stats(self) -> RoutedStats:
        """Returns the statistics of all routes together, and `by_route` those of each."""
        with self._lock:
            by_route = dict(self._stats_before)
            for name, assistant in self._assistants():
                before = by_route.get(name)
                by_route[name] = assistant.stats if before is None else RoutedStats.of([before, assistant.stats])
            stats = RoutedStats.of(list(by_route.values()))
            stats.by_route, stats.routing_seconds = by_route, self._score_seconds
            stats.learning_seconds += self._score_seconds
            return stats

    def report(self) -> str:
        """Describes each route in a few lines, see [`OnlineAssistant.report`]."""
        with self._lock:
            lines = []
            for name, assistant in self._assistants():
                if name != DEFAULT or assistant.stats.total.requests or not len(self.pool):
                    text = assistant.report()
                    lines.append(f"Route {name}:\n" + "\n".join(f"  {line}" for line in text.splitlines()))
            if self._score_seconds:
                lines.append(
                    f"All drafts were scored on one request in {_SCORE_EVERY} at most, so that topics go where they are served best, in {self._score_seconds:.1f} s."
                )
            away = sorted(self._stats_before.keys() - {name for name, _ in self._assistants()})
            if away:
                lines.append(f"Put away: {', '.join(away)}.")
            return "\n".join(lines)

    def report_of(self, name: str) -> str:
        """Describes one route in a few lines."""
        with self._lock:
            if (assistant := dict(self._assistants()).get(name)) is not None:
                return assistant.report()
            if name in self._stats_before:
                return f"Route {name!r} is not in memory: it was put away, for others were used since."
            return f"Route {name!r} has served no call yet."


def _features_of(request: GenerateRequest) -> torch.Tensor | None:
    """Computes the features of a call's prompt; `None` where it is no tokens, or the target's embeddings cannot be read."""
    embeddings = getattr(request.target.get_input_embeddings(), "weight", None)
    if not request.reads_tokens or embeddings is None or embeddings.is_meta or not embeddings.is_floating_point():
        return None
    tokens = request.input_ids[0] if request.mask is None else request.input_ids[0][request.mask[0].bool()]
    return prompt_features(embeddings.detach(), tokens)
