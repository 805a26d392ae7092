"""What the tests of an assistant serve: prompts, and greedy calls of a target with it; and what the target says alone."""

import gc
import threading
import weakref
from collections.abc import Callable

import torch

PROMPTS = torch.randint(2, 64, (12, 1, 6), generator=torch.Generator().manual_seed(0))
GREEDY = {"max_new_tokens": 16, "do_sample": False}


def serve(target, assistant, prompts=PROMPTS, **kwargs) -> list[torch.Tensor]:
    """The outputs of `target.generate(prompt, **GREEDY, **kwargs)` with `assistant`, one call a prompt."""
    return [target.generate(prompt, assistant_model=assistant, **GREEDY | kwargs) for prompt in prompts]


_said = weakref.WeakKeyDictionary()  # by target, the outputs by prompt and arguments


def alone(target, prompt, **kwargs) -> torch.Tensor:
    """The output of `target.generate(prompt, **kwargs)`, greedy and without an assistant. The target never changes, so that what it says is decoded once."""
    outputs, key = _said.setdefault(target, {}), (str(prompt.tolist()), str(sorted(kwargs.items())))
    if key not in outputs:
        outputs[key] = target.generate(prompt, **kwargs)
    return outputs[key]


def logits(model, ids=PROMPTS[0]):
    """What a model says of a text, by one forward."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def in_threads(*work: Callable[[], object], within: float = 120) -> list[BaseException]:
    """Do all of it at once; returns the errors that were raised, and one for each thread that has not ended `within` so many seconds. What the threads have left is gone by then."""
    errors = []

    def safely(act):
        try:
            act()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=safely, args=(act,), daemon=True) for act in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(within)
    errors += [TimeoutError(f"{thread.name} has not ended") for thread in threads if thread.is_alive()]
    gc.collect()
    return errors
