"""A user's own logits processors and stopping criteria, with and without state: `state()` is that of one that has some."""

import threading
import weakref
from collections import deque

import torch
from transformers import LogitsProcessor, StoppingCriteria

LENGTH = 6  # of the prompts that they are for

# Processors. Each biases tokens from 2 on, so that EOS ends nothing early.


class Biased(LogitsProcessor):
    """In place, without state, and the same at all positions."""

    def __call__(self, input_ids, scores):
        scores[:, 7] += 2.0
        return scores


class Shifting(LogitsProcessor):
    """Out of place, and without state."""

    def __call__(self, input_ids, scores):
        return torch.where(torch.arange(scores.shape[-1]) % 2 == input_ids.shape[1] % 2, scores + 2.0, scores)


class Writing(LogitsProcessor):
    """In place, and without state."""

    def __call__(self, input_ids, scores):
        scores[:, 2 + input_ids.shape[1] % 7] += 4.0
        return scores


def shifting(input_ids, scores):
    """A plain function serves as a processor too."""
    return Shifting()(input_ids, scores)


class Counting(LogitsProcessor):
    """Biases by the number of its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores = scores.clone()
        scores[:, 2 + self.calls % (scores.shape[-1] - 2)] += 5.0
        return scores

    def state(self):
        return self.calls


class Late(Counting):
    """Without state at first: nothing that is tried out at the start of a call shows it."""

    def __call__(self, input_ids, scores):
        return super().__call__(input_ids, scores) if input_ids.shape[1] > LENGTH + 6 else scores


class Remembering(LogitsProcessor):
    """Penalises the tokens it has seen come last: a list."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(int(input_ids[0, -1]))
        scores = scores.clone()
        scores[:, self.seen] -= 6.0
        return scores

    def state(self):
        return list(self.seen)


class Tallying(LogitsProcessor):
    """The same in a tensor, written in place, as the scores are."""

    def __init__(self):
        self.tally = torch.zeros(64)

    def __call__(self, input_ids, scores):
        self.tally[scores.argmax(-1)] += 1.0
        scores -= 3.0 * self.tally
        return scores

    def state(self):
        return self.tally.tolist()


class Nesting(LogitsProcessor):
    """Its state lies deeper."""

    def __init__(self):
        self.inner = {"counting": [Counting()]}

    def __call__(self, input_ids, scores):
        return self.inner["counting"][0](input_ids, scores)

    def state(self):
        return self.inner["counting"][0].calls


class Slotted:
    """No LogitsProcessor, no `__dict__`."""

    __slots__ = ("counting",)

    def __init__(self):
        self.counting = Counting()

    def __call__(self, input_ids, scores):
        return self.counting(input_ids, scores)

    def state(self):
        return self.counting.calls


class Noisy(LogitsProcessor):
    """Draws from a generator of its own."""

    def __init__(self):
        self.random = torch.Generator().manual_seed(3)

    def __call__(self, input_ids, scores):
        return scores + 3.0 * torch.randn(scores.shape, generator=self.random)

    def state(self):
        return self.random.get_state().tolist()


class Sealed(Counting):
    """Holds what cannot be copied, a lock or a connection."""

    def __deepcopy__(self, memo):
        raise TypeError("cannot copy this")


class Closure:
    """A plain function over its state: copying it copies nothing."""

    def __new__(cls):
        counting = Counting()

        def process(input_ids, scores):
            return counting(input_ids, scores)

        process.state = counting.state
        return process


STATEFUL = [Counting, Late, Remembering, Tallying, Nesting, Slotted, Noisy, Sealed, Closure]


# Budgets: END comes at the seventh place, and nowhere else. What they know lies where a copy is easily not one.

END = 63


def only(scores, end: bool):
    """Nothing but END is left, or all else but EOS."""
    scores = scores.clone()
    if end:
        scores[:] = -torch.inf
        scores[:, END] = 0.0
    else:
        scores[:, [1, END]] = -torch.inf
    return scores


class Stepping(LogitsProcessor):
    """In which of its methods comes next."""

    def __init__(self):
        self.left, self.step = 6, self.think

    def __call__(self, input_ids, scores):
        return self.step(scores)

    def think(self, scores):
        self.left -= 1
        self.step = self.think if self.left else self.close
        return only(scores, end=False)

    def close(self, scores):
        self.step = self.free
        return only(scores, end=True)

    def free(self, scores):
        return only(scores, end=False)


class Calls:
    """Counts for its owner."""

    def __init__(self, owner):
        self.owner = owner

    def count(self):
        self.owner.calls += 1
        return self.owner.calls


class Parted(LogitsProcessor):
    """In itself, written by a part that points back to it."""

    def __init__(self):
        self.calls, self.part = 0, Calls(self)

    def __call__(self, input_ids, scores):
        return only(scores, end=self.part.count() == 7)


class WeaklyParted(Parted):
    def __init__(self):
        self.calls, self.part = 0, Calls(weakref.proxy(self))


class Referring(Parted):
    """Counts where a weak reference leads."""

    def __init__(self):
        self.calls, self.self = 0, weakref.ref(self)

    def __call__(self, input_ids, scores):
        self.self().calls += 1
        return only(scores, end=self.calls == 7)


class Popping(LogitsProcessor):
    """Behind the method of a deque."""

    def __init__(self):
        self.is_end = deque([False] * 6 + [True] + [False] * 32).popleft

    def __call__(self, input_ids, scores):
        return only(scores, end=self.is_end())


class Enclosed(LogitsProcessor):
    """In the variables of a function."""

    def __init__(self):
        calls = 0

        def is_end():
            nonlocal calls
            calls += 1
            return calls == 7

        self.is_end = is_end

    def __call__(self, input_ids, scores):
        return only(scores, end=self.is_end())


class Generating(LogitsProcessor):
    """In a generator, made when it is first asked."""

    ends = None

    def __call__(self, input_ids, scores):
        self.ends = self.ends or (i == 6 for i in range(64))
        return only(scores, end=next(self.ends))


class Locking(Parted):
    """Holds a lock from its fourth call on."""

    def __call__(self, input_ids, scores):
        if self.calls == 3:
            self.lock = threading.Lock()
        return super().__call__(input_ids, scores)


class Knowing(LogitsProcessor):
    """A grammar: knows what may follow what it has allowed, and fails on all else."""

    def __init__(self):
        self.state, self.follows = 0, {}

    def __call__(self, input_ids, scores):
        if self.state:
            self.follows[self.state, int(input_ids[0, -1])]  # KeyError
        self.state += 1
        allowed = [END] if self.state == 7 else range(2 + self.state, 8 + self.state)
        self.follows = {(self.state, token): None for token in allowed}
        masked = torch.full_like(scores, -torch.inf)
        masked[:, list(allowed)] = scores[:, list(allowed)]
        return masked


BUDGETS = [Stepping, Parted, WeaklyParted, Referring, Popping, Enclosed, Generating, Locking, Knowing]
UNCOPIED = [Referring, Popping, Enclosed, Generating, Locking]


# Stopping criteria.


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= LENGTH + 7)

    def state(self):
        return None


class AtToken(AtLength):
    """At one of a third of all tokens, in the last place only."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 3 == 0) & (input_ids.shape[1] > LENGTH + 3)


class AfterCalls(StoppingCriteria):
    def __init__(self):
        self.calls, self.lengths = 0, []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls += 1
        self.lengths.append(input_ids.shape[1])
        return torch.full((input_ids.shape[0],), self.calls % 9 == 0)

    def state(self):
        return self.calls, self.lengths


class Watching(AfterCalls):
    """Stops nothing."""

    def __call__(self, input_ids, scores, **kwargs):
        return super().__call__(input_ids, scores) & False
