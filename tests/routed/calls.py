"""What the tests of routes serve: prompts, greedy calls that must be the target's own answers, and how routes learn here."""

import torch

from ..served import alone

GREEDY = {"max_new_tokens": 16, "do_sample": False}
LEARNS = {"update_interval": 2, "learning_rate": 5e-3, "gate": False, "learning_budget": 1.0, "seed": 0}


def prompts(count, low=2, high=64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (1, 8), generator=random) for _ in range(count)]


def serve(target, assistant, prompt, **kwargs):
    output = target.generate(prompt, assistant_model=assistant, **{**GREEDY, **kwargs})
    assert torch.equal(output, alone(target, prompt, **{**GREEDY, **kwargs}))
    return output
