"""`Topics` finds the topics of prompts by online clustering: it takes a feature vector for each prompt and gives the number of its cluster.

Symbols: x is a prompt's features, H numbers; m and s are their running mean and standard deviation over all prompts, each feature by itself; a topic has a mean
c and a variance v. Distances are means over the H features of ((x - c) / s)², so that a few large features do not decide alone.

A topic opens in two ways. A prompt that is far from every mean, measured by how far a topic's own prompts lie from it, opens one at once. And now and then a topic's latest prompts
are looked at together: if they fall into two groups, more clearly than one group by chance would, the smaller one becomes a topic (as in G-means, Hamerly and Elkan 2003). Topics that do not fall into two groups any more join. The first finds what is new, the second what was
mixed from the start, when nothing was known yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

MAX_TOPICS = 32
# Latest prompts whose features are kept, of all topics together: 2 MiB at H = 2048.
_KEPT = 256
# Prompts over which m and s, and a topic's mean and variance, are averaged once there are so many.
_MEMORY, _TOPIC_MEMORY = 1024, 64
# Multiple of a topic's variance from which a prompt is far from it, and the prompts that the topic must have had.
_FAR, _KNOWN = 4.0, 8
# A topic's variance is drawn towards that of all topics with the weight of so many prompts.
_PRIOR = 8.0
# A topic is looked at after so many further prompts, by so many of its latest ones, along so many principal directions; a group of it has at least so many.
_LOOK_EVERY, _LOOK_AT, _DIRECTIONS, _LEAST = 8, 64, 3, 4
# Rounds of 2-means, at most.
_ROUNDS = 6
# Share of the variance between two groups that they leave unexplained, at most. One Gaussian cut at its mean leaves 1 - 2/π = .36; the best of
# three cuts of n prompts leaves less than .36 - 1/√n about once in a hundred looks (by simulation, n from 16 to 64).
_UNEXPLAINED, _CHANCE = 0.2, 1.0
# Two topics whose groups leave more than this unexplained are one.
_REJOINED = 0.22
# s of a feature is at least this share of the root mean square of all, and that share of the mean's: below it is rounding.
_FLOOR, _ROUNDING = 0.03, 1e-4
# A topic's prompts lie at least so far from its mean.
_LEAST_SPREAD = 0.01
# Longer features are reduced to this length.
_LONGEST = 2048


@dataclass
class Topic:
    """A cluster of prompts.

    Attributes:
        mean, variance (`Tensor` float `(H,)`): of its prompts' features, the latest ones counting more.
        count (`int`): prompts that it has had.
        seen (`int`): number of the last of them, over all topics.
        looked (`int`): its `count` when it was last looked at.
    """

    mean: Tensor
    variance: Tensor
    count: int = 0
    seen: int = 0
    looked: int = 0

    def add(self, x: Tensor):
        """Move mean and variance towards a prompt's features."""
        self.count += 1
        rate = 1 / min(self.count, _TOPIC_MEMORY)
        off = x - self.mean
        self.mean.add_(off, alpha=rate)
        self.variance.add_(off.square() * (1 - rate) - self.variance, alpha=rate)


@dataclass
class Assigned:
    """What became of the topics with one prompt.

    Attributes:
        topic (`int`): the prompt's.
        opened (`list[tuple[int, int]]`): topics that opened, each with the topic that it was nearest to, or -1 for the first one.
        joined (`list[tuple[int, int]]`): topics that are no more, each with the topic that its prompts have gone to.
    """

    topic: int
    opened: list[tuple[int, int]] = field(default_factory=list)
    joined: list[tuple[int, int]] = field(default_factory=list)


class Topics:
    """Clusters prompts by their features, online and deterministically. Memory is bounded: `MAX_TOPICS` topics and the features of `_KEPT` prompts.

    Attributes:
        found (`dict[int, Topic]`): the topics by number. Numbers are not used again.
        steps (`int`): prompts so far.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.found: dict[int, Topic] = {}
        self.steps, self._next = 0, 0
        self._mean: Tensor | None = None  # m, and below s²
        self._variance: Tensor | None = None
        self._kept: Tensor | None = None  # (_KEPT, H), a ring
        self._length: int | None = None  # of features as they come
        self._labels: list[int] = []  # topics of what is kept

    def assign(self, x: Tensor) -> Assigned:
        """Find the topic of a prompt, and learn from it.

        Args:
            x (`Tensor` float `(H,)`): its features.

        Raises:
            ValueError: if they are no vector of finite numbers, or of another length than those before.
        """
        x = self._reduced(x)
        self._observe(x)
        done = Assigned(-1)
        if not self.found:
            topic = self._open(-1, done)
        else:
            numbers = list(self.found)
            far = self.distances(x)
            i = int(far.argmin())
            topic = numbers[i]
            near = self.found[topic]
            if near.count >= _KNOWN and float(far[i]) > _FAR * self._spread(near) and self._has_room():
                topic = self._open(topic, done)
        row = (self.steps - 1) % _KEPT
        self._kept[row] = x
        if row == len(self._labels):
            self._labels.append(topic)
        else:
            self._labels[row] = topic
        mine = self.found[topic]
        mine.add(x)
        mine.seen = self.steps
        if mine.count - mine.looked >= _LOOK_EVERY and mine.count >= 2 * _LEAST:
            mine.looked = mine.count
            if not (self._has_room() and self._split(topic, done)) and len(self.found) > 1:
                self._join(topic, done)
        done.topic = self._labels[row]
        return done

    def state(self) -> dict:
        """Return all that it has learnt: numbers, lists, dicts and tensors."""
        found = {
            str(number): {**vars(topic), "mean": topic.mean.clone(), "variance": topic.variance.clone()}
            for number, topic in self.found.items()
        }
        state = {
            "found": found,
            "steps": self.steps,
            "next": self._next,
            "length": self._length,
            "labels": list(self._labels),
        }
        if self._mean is not None:
            state |= {
                "mean": self._mean.clone(),
                "variance": self._variance.clone(),
                "kept": self._kept[: len(self._labels)].clone(),
            }
        return state

    def load_state(self, state: Mapping):
        """Continue from what `state` returned."""
        self.found = {
            int(number): Topic(**{**values, "mean": values["mean"].clone(), "variance": values["variance"].clone()})
            for number, values in state["found"].items()
        }
        self.steps, self._next, self._length, self._labels = (
            state["steps"],
            state["next"],
            state["length"],
            list(state["labels"]),
        )
        if "mean" in state:
            self._mean, self._variance = state["mean"].clone(), state["variance"].clone()
            self._kept = torch.zeros(_KEPT, len(self._mean), dtype=torch.float32, device="cpu")
            self._kept[: len(self._labels)] = state["kept"]

    def distances(self, x: Tensor) -> Tensor:
        """Measure the distance of features to each topic's mean, `(topics,)` in their order in `found`."""
        means = torch.stack([topic.mean for topic in self.found.values()])
        return ((means - x) / self._scale()).square().mean(1)

    def nearest(self, topic: int, among: list[int]) -> int:
        """Find the topic of `among` whose mean is nearest to a topic's."""
        far = dict(zip(self.found, self.distances(self.found[topic].mean).tolist(), strict=True))
        return min(among, key=lambda other: (far[other], other))

    def drop(self, topic: int):
        """Remove a topic; its prompts will go to the nearest one."""
        del self.found[topic]
        self._labels = [-1 if label == topic else label for label in self._labels]

    def _reduced(self, x: Tensor) -> Tensor:
        """Check features, and add those of more than `_LONGEST` up to so many, with random signs (count sketch, Charikar et al. 2002)."""
        if x.ndim != 1 or not len(x) or self._length not in (None, len(x)):
            wanted = "a vector" if self._length is None else f"a vector of {self._length} numbers, as those before"
            raise ValueError(f"The features have the shape {tuple(x.shape)}; give {wanted}.")
        x = x.detach().to("cpu", torch.float32)
        if not bool(x.isfinite().all()):
            raise ValueError("The features are not all finite numbers.")
        self._length = len(x)
        if len(x) <= _LONGEST:
            return x
        generator = torch.Generator().manual_seed(self.seed)
        places = torch.randint(_LONGEST, x.shape, generator=generator, device="cpu")
        signs = torch.randint(2, x.shape, generator=generator, device="cpu").float() * 2 - 1
        return torch.zeros(_LONGEST, dtype=torch.float32, device="cpu").index_add_(0, places, x * signs)

    def _observe(self, x: Tensor):
        """Update m and s."""
        if self._mean is None:
            self._mean, self._variance = torch.zeros_like(x), torch.zeros_like(x)
            self._kept = torch.zeros(_KEPT, len(x), dtype=torch.float32, device="cpu")
        self.steps += 1
        rate = 1 / min(self.steps, _MEMORY)
        off = x - self._mean
        self._mean.add_(off, alpha=rate)
        self._variance.add_(off.square() * (1 - rate) - self._variance, alpha=rate)

    def _scale(self) -> Tensor:
        """Give s, `(H,)`, positive."""
        floor = max(float(self._variance.mean()) * _FLOOR**2, float(self._mean.square().mean()) * _ROUNDING**2, 1e-30)
        return self._variance.clamp_min(floor).sqrt()

    def _spread(self, topic: Topic) -> float:
        """Estimate the mean distance of a topic's prompts to its mean."""
        scale = self._scale().square()
        spreads = torch.stack([(other.variance / scale).mean() for other in self.found.values()])
        counts = torch.tensor(
            [float(min(other.count, _TOPIC_MEMORY)) for other in self.found.values()],
            dtype=torch.float32,
            device="cpu",
        )
        pooled = float((spreads * counts).sum() / (counts - 1).clamp_min(0).sum().clamp_min(1))
        own, n = float((topic.variance / scale).mean()), min(topic.count, _TOPIC_MEMORY)
        return max((n * own + _PRIOR * pooled) / (n - 1 + _PRIOR), _LEAST_SPREAD)

    def _has_room(self) -> bool:
        """Tell whether a topic can open; drops one that nothing is kept of, if need be."""
        if len(self.found) < MAX_TOPICS:
            return True
        oldest = min(self.found, key=lambda number: self.found[number].seen)
        if self.found[oldest].seen > self.steps - _KEPT:
            return False
        self.drop(oldest)
        return True

    def _open(self, near: int, done: Assigned) -> int:
        number, self._next = self._next, self._next + 1
        self.found[number] = Topic(torch.zeros_like(self._mean), torch.zeros_like(self._mean))
        done.opened.append((number, near))
        return number

    def _latest(self, topic: int, count: int) -> list[int]:
        """Find where a topic's latest prompts are kept, the earliest first."""
        order = [(self.steps - 1 - back) % _KEPT for back in range(len(self._labels))]
        return [row for row in order if self._labels[row] == topic][:count][::-1]

    def _split(self, topic: int, done: Assigned) -> bool:
        """Make a topic of a group of a topic's latest prompts, if they fall into two, and so on with both. Returns whether they do."""
        rows = self._latest(topic, _LOOK_AT)
        side = two_groups(self._kept[rows] / self._scale(), _UNEXPLAINED)
        if side is None:
            return False
        other = self._open(topic, done)
        for number, group in ((topic, False), (other, True)):
            self._found_of(number, [row for row, apart in zip(rows, side, strict=True) if apart == group])
        for number in (topic, other):
            if self._has_room():
                self._split(number, done)
        return True

    def _join(self, topic: int, done: Assigned):
        """Join a topic with the nearest one if their latest prompts do not fall into two groups any more; the one with fewer prompts is given up."""
        other = self.nearest(topic, [number for number in self.found if number != topic])
        parts = [self._latest(number, _LOOK_AT // 2) for number in (topic, other)]
        if min(map(len, parts)) < _LOOK_EVERY:
            return
        rows = parts[0] + parts[1]
        if two_groups(self._kept[rows] / self._scale(), _REJOINED) is not None:
            return
        gone, into = sorted((topic, other), key=lambda number: (self.found[number].count, -number))
        count = self.found[topic].count + self.found[other].count
        self._labels = [into if label == gone else label for label in self._labels]
        del self.found[gone]
        self._found_of(into, sorted(rows, key=lambda row: (row - self.steps) % _KEPT))
        self.found[into].count = self.found[into].looked = count
        done.joined.append((gone, into))

    def _found_of(self, number: int, rows: list[int]):
        """Compute a topic anew from some of the prompts that are kept."""
        zeros = torch.zeros_like(self._mean)
        topic = self.found[number] = Topic(zeros, zeros.clone(), seen=self.steps)
        for row in rows:
            self._labels[row] = number
            topic.add(self._kept[row])
        topic.looked = topic.count


def two_groups(z: Tensor, limit: float) -> list[bool] | None:
    """Part prompts into two groups: 2-means on the sphere around their mean, from cuts along principal directions.

    Prompts are placed on the line through the two groups' means, each by means that leave it out: of many features, some would part any prompts. Two groups are believed if they
    leave little of the variance along the line unexplained.

    Args:
        z (`Tensor` float `(n, H)`): the prompts' features.
        limit (`float`): the share that they may leave unexplained; less for few prompts.

    Returns:
        `list[bool]` or `None`: which prompts are in the smaller group; `None` if they are one group, as far as can be told.
    """
    n = len(z)
    best = min(limit, 1 - 2 / math.pi - _CHANCE / math.sqrt(max(n, 1)))
    if n < 2 * _LEAST or best <= 0:
        return None
    z = z - z.mean(0)
    z = z / z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    products = (z @ z.T).double()
    found = None
    for along in torch.linalg.eigh(products)[1][:, -_DIRECTIONS:].T:
        side = _two_means(products, along)
        if min(int(side.sum()), n - int(side.sum())) < _LEAST:
            continue
        places = _places(products, side)
        off = torch.where(side, places - places[side].mean(), places - places[~side].mean())
        unexplained = float(off.square().sum() / (places - places.mean()).square().sum().clamp_min(1e-30))
        if unexplained < best:
            best, found = unexplained, side
    if found is None:
        return None
    return (found if 2 * int(found.sum()) <= n else ~found).tolist()


def _two_means(products: Tensor, along: Tensor) -> Tensor:
    """Part points into two groups by 2-means, from the best cut along a direction; returns who is in the first, bool `(n,)`.

    Args:
        products (`Tensor` float `(n, n)`): inner products of the points.
        along (`Tensor` float `(n,)`): where they lie along the direction.
    """
    n = len(along)
    values, order = along.sort(stable=True)
    left = torch.arange(_LEAST, n - _LEAST + 1, device="cpu")
    sums, whole = values.cumsum(0)[left - 1], values.sum()
    cut = int(left[(sums.square() / left + (whole - sums).square() / (n - left)).argmax()])
    side = torch.zeros(n, dtype=torch.bool, device="cpu")
    side[order[:cut]] = True
    for _ in range(_ROUNDS):
        count = int(side.sum())
        if min(count, n - count) < _LEAST:
            break
        far = []
        for group in (side, ~side):
            to = products[:, group]
            far.append(to[group].mean() - 2 * to.mean(1))
        before, side = side, far[0] < far[1]
        if bool((side == before).all()):
            break
    return side


def _places(products: Tensor, side: Tensor) -> Tensor:
    """Place points on the line through the means of two groups, 0 between them, `(n,)`: each by means that leave the point itself out."""
    first, own = side.double(), products.diag()
    second = 1 - first
    to_first, to_second = products @ first, products @ second
    n, m = first.sum() - first, second.sum() - second  # without the point
    across = (first @ to_second - first * to_second - second * to_first) / (n * m)
    within = [
        (group @ to - group * (2 * to - own)) / count.square()
        for group, to, count in ((first, to_first, n), (second, to_second, m))
    ]
    gap = (to_first - first * own) / n - (to_second - second * own) / m - (within[0] - within[1]) / 2
    return gap / (within[0] + within[1] - 2 * across).clamp_min(1e-12).sqrt()
