"""A user's own logits processors and stopping criteria, with and without state: `state()` is that of one that has some."""

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
