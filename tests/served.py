"""What the tests of an assistant serve: prompts, and greedy calls of a target with it."""

import torch

PROMPTS = torch.randint(2, 64, (12, 1, 6), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 16, "do_sample": False}


def serve(target, assistant, prompts=PROMPTS, **kwargs) -> list[torch.Tensor]:
    """The outputs of `target.generate(prompt, **GREEDY, **kwargs)` with `assistant`, one call a prompt."""
    return [target.generate(prompt, assistant_model=assistant, **GREEDY | kwargs) for prompt in prompts]
