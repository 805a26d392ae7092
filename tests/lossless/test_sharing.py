"""One assistant for several threads and targets, several assistants for one target, and copies of what takes part."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

import hf_osd
from hf_osd import OnlineAssistant

from ..served import in_threads
from .checks import SERVES_AT_ONCE

PROMPTS = torch.randint(2, 64, (4, 1, 6), generator=torch.Generator().manual_seed(7))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def other(tiny_model):
    return tiny_model("Llama", seed=1)


def assist(draft, **config):
    return OnlineAssistant(
        draft,
        **{
            "lookahead": "constant",
            "update_interval": 3,
            "learning_rate": 1e-3,
            "seed": 0,
            **SERVES_AT_ONCE,
            **config,
        },
    )


def answers(model, **kwargs):
    return [model.generate(prompt, **GREEDY, **kwargs).tolist() for prompt in PROMPTS]


class EachRound(BaseStreamer):
    def __init__(self, act):
        self.act, self.begun = act, False

    def put(self, value):
        if self.begun:
            self.act()
        self.begun = True

    def end(self):
        pass


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_target_are_whole(target, draft, copied):
    """Taken in mid-call and afterwards; nothing of the assistant hangs on them."""
    plain, assistant, made = answers(target), assist(draft), []
    streamer = EachRound(lambda: made or made.append(copied(target)))
    target.generate(PROMPTS[0], assistant_model=assistant, streamer=streamer, **GREEDY)
    made.append(copied(target))
    assert len(made) == 2
    for model in made:
        assert answers(model) == plain
        assert answers(model, assistant_model=assistant) == plain


def test_threads_generate_on_one_assistant_at_once(target, draft, tmp_path):
    """While it learns; and what stock writes into the draft's generation config after each call is what was there."""
    scheduled = copy.deepcopy(draft)
    scheduled.generation_config = GenerationConfig(
        num_assistant_tokens=3, num_assistant_tokens_schedule="heuristic", pad_token_id=0
    )
    plain, assistant, wrong = answers(target), assist(scheduled), []

    def work():
        if answers(target, assistant_model=assistant) != plain:
            wrong.append(1)

    assert in_threads(work, work, work) == []
    assert not wrong
    assistant.flush()
    stats = assistant.stats
    assert stats.total.requests == 3 * len(PROMPTS)
    assert stats.updates > 0
    assert stats.failed_updates == 0
    assert not assistant.serving._leases
    for model in (scheduled, assistant.serving.active):
        assert model.generation_config.num_assistant_tokens == 3
    assistant.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.num_assistant_tokens == 3


@pytest.mark.parametrize("at_once", [False, True])
def test_two_targets_share_an_assistant(target, other, draft, at_once):
    plain = {id(model): answers(model) for model in (target, other)}
    assistant, got = assist(draft), {}
    work = [
        lambda model=model: got.update({id(model): answers(model, assistant_model=assistant)})
        for model in (target, other)
    ]
    if at_once:
        assert in_threads(*work) == []
    else:
        for act in work:
            act()
    assert got == plain
    assert assistant.stats.failed_updates == 0
    assert assistant.stats.updates > 0


def test_a_target_has_several_assistants(target, draft, noised_copy):
    plain = answers(target)
    assistants = [assist(draft), assist(noised_copy(target, 0.4))]
    got = [[] for _ in assistants]
    work = [
        lambda out=out, a=a: out.append(answers(target, assistant_model=a))
        for out, a in zip(got, assistants, strict=True)
    ]
    assert in_threads(*work) == []
    assert got == [[plain], [plain]]
    # What one has observed is not the other's.
    alphas = [assistant.stats.total.alpha_live for assistant in assistants]
    assert alphas[0] > alphas[1]


def test_a_call_within_a_call(target, other, draft):
    """From a streamer: the inner call, of the same or of another target, leaves the outer as it was, its stopping criteria too."""
    plain, others, assistant, inner = answers(target), answers(other), assist(draft, update_interval=1), []

    def call():
        for model, own in ((target, plain), (other, others)):
            output = model.generate(PROMPTS[1], assistant_model=assistant, **GREEDY)
            inner.append(output.tolist() == own[1])

    output = target.generate(PROMPTS[0], assistant_model=assistant, streamer=EachRound(call), **GREEDY)
    assert output.tolist() == plain[0]
    assert len(inner) > 4
    assert all(inner)


def test_a_call_within_a_call_leaves_the_outer_one_open(target, draft):
    """Its lease too, or an update could write the copy that it drafts with; and what it observes is not cut short."""
    assistant, inner, leases = assist(draft, update_interval=10**6), [], []

    def call():
        if len(inner) < 2:
            inner.append(target.generate(PROMPTS[1 + len(inner)], assistant_model=assistant, **GREEDY))
        leases.append(sum(assistant.serving._leases.values()))

    outer = target.generate(PROMPTS[0], assistant_model=assistant, streamer=EachRound(call), **GREEDY)
    assistant.update()
    learnt = {tuple(feedback.tokens.tolist()) for feedback in assistant.buffer.new()}
    assert learnt == {tuple(output[0].tolist()) for output in (outer, *inner)}
    assert assistant.stats.total.requests == 3
    assert assistant.stats.total.new_tokens == 3 * GREEDY["max_new_tokens"]
    assert min(leases) >= 1
    assert not assistant.serving._leases


def test_after_a_call_that_broke_off(target, draft):
    plain, assistant = answers(target), assist(draft)

    def fail():
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        target.generate(PROMPTS[0], assistant_model=assistant, streamer=EachRound(fail), **GREEDY)
    assert answers(target, assistant_model=assistant) == plain
    assistant.update()
    assert not assistant.serving._leases


def test_the_seam_closed_and_opened_between_calls(target, draft):
    plain, assistant = answers(target), assist(draft)
    assert answers(target, assistant_model=assistant) == plain
    hf_osd.disable()
    try:
        assert answers(target, assistant_model=assistant) == plain  # by a stock generator, learning nothing
        assert assistant.stats.total.requests == len(PROMPTS)
    finally:
        hf_osd.enable()
    assert answers(target, assistant_model=assistant) == plain
    assistant.update()
    assert assistant.stats.total.requests == 2 * len(PROMPTS)
