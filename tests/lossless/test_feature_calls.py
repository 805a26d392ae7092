"""Drafts that read the target's states in calls of every kind: served exactly, and taught by the states of the positions that there are."""

import copy
from functools import partial

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from hf_osd import OnlineAssistant, grow_feature_draft
from hf_osd.generation.recorder import CallRecorder

from ..served import in_threads
from .checks import check_sampling
from .feature_drafts import check_drafted, fitted, states_of

PROMPTS = torch.randint(3, 60, (3, 1, 6), generator=torch.Generator().manual_seed(0))
ALONE = {"suffix_cache": False, "num_assistant_tokens": 3}
LEARNS = {"update_interval": 2, "learning_rate": 1e-2, "warmup_steps": 0, "ema_decay": 0.0}


@pytest.fixture(scope="module")
def target(tiny_model):
    return tiny_model("Llama", layers=4)


@pytest.fixture(scope="module")
def draft(target):
    return fitted(target, PROMPTS[:2])


def check_states(target, feedback, **kwargs):
    """All that the target has read is kept, from the first position that is."""
    fresh = states_of(target, feedback.tokens[None].long(), kwargs.pop("layers", [1, 2, 3, 4]))[0]
    kept = feedback.states
    assert kept.stop == len(feedback.tokens) - 1
    torch.testing.assert_close(kept.dense(), fresh[kept.start : -1], atol=float(fresh.abs().amax()) / 100, rtol=0)


class Puts(BaseStreamer):
    def put(self, value):
        pass

    def end(self):
        pass


class FavoursWhatIsNew(LogitsProcessor):
    """Has state: it counts how often it was asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_fill(-1, torch.tensor([3 + self.calls % 50]), -20.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda target: {"prefill_chunk_size": 2},
        lambda target: {"cache_implementation": "dynamic"},
        lambda target: {"past_key_values": DynamicCache(config=target.config)},
        lambda target: {"position_ids": torch.arange(6)[None]},
        lambda target: {"inputs_embeds": target.get_input_embeddings()(PROMPTS[0])},
        lambda target: {"streamer": Puts()},
        lambda target: {"logits_processor": [FavoursWhatIsNew()]},
        lambda target: {"logits_to_keep": 3},
        lambda target: {"output_scores": True, "output_logits": True},
        lambda target: {"output_hidden_states": True},
        lambda target: {"max_time": 100.0},
    ],
    ids=lambda make: str(make.__code__.co_consts[1]),
)
def test_options_of_a_call(target, draft, serve, make):
    plain = target.generate(PROMPTS[0], max_new_tokens=24, do_sample=False, pad_token_id=0, **make(target))
    served = serve(target, draft, PROMPTS[:1], ALONE, **make(target))
    assert served.outputs[0].tolist() == plain.tolist()
    assert served.stats.total.drafted > 0
    check_states(target, served.feedback[0])


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_other_dtypes_than_the_targets(target, draft, serve, dtypes, context):
    target, draft = (copy.deepcopy(m).to(dtype) for m, dtype in zip((target, draft), dtypes, strict=True))
    with context():
        plain = target.generate(PROMPTS[0], max_new_tokens=12, do_sample=False, pad_token_id=0)
        served = serve(target, draft, PROMPTS[:1], ALONE | LEARNS, max_new_tokens=12)
        assert served.outputs[0].tolist() == plain.tolist()
    assert served.feedback[0].states.stop == len(served.feedback[0].tokens) - 1


@pytest.mark.parametrize("mask", [[0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]], ids=str)
def test_padding_anywhere(target, draft, serve_as_plain, mask):
    served = serve_as_plain(target, draft, PROMPTS[:1], ALONE, attention_mask=torch.tensor([mask]))
    [feedback] = served.feedback
    assert feedback.prompt_length == (sum(mask) or 6)
    assert feedback.states.stop == len(feedback.tokens) - 1
    assert served.stats.total.drafted > 0


@pytest.mark.parametrize("layers", [[0, 2, 4], [4, 1]], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT2"])
def test_embeddings_and_the_last_layer_are_states_too(tiny_model, serve_as_plain, name, layers):
    target = tiny_model(name, layers=4)
    draft = fitted(target, PROMPTS[:1], layers=layers, steps=30)
    served = serve_as_plain(target, draft, PROMPTS[:2], ALONE)
    for feedback in served.feedback:
        check_drafted(target, draft, feedback, 3)
        check_states(target, feedback, layers=layers)


def test_a_target_that_sees(tiny_model, serve_as_plain):
    """The states of an image's places are the target's; the draft reads them with the tokens that stand there."""
    target = tiny_model("Llava", layers=4)
    prompt = torch.cat([PROMPTS[0][:, :2], torch.full((1, 4), 63), PROMPTS[0][:, 2:]], dim=-1)
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = {"pixel_values": pixels, "suppress_tokens": [63]}
    served = serve_as_plain(target, grow_feature_draft(target), [prompt], ALONE, **asked)
    [feedback] = served.feedback
    with torch.no_grad():
        text = feedback.tokens[None].long()
        hidden = target(text, pixel_values=pixels, output_hidden_states=True, use_cache=False).hidden_states
    fresh = torch.cat([hidden[i] for i in [1, 2, 3, 4]], dim=-1)[0, :-1]
    assert served.stats.total.tested > 0
    torch.testing.assert_close(feedback.states.dense(), fresh, atol=float(fresh.abs().amax()) / 100, rtol=0)


def test_attentions_that_the_target_does_not_give_are_not_given(target, draft, tiny_model):
    """transformers' assisted generation fails on their lack; an eager target gives them, and is drafted for."""
    eager = copy.deepcopy(target)
    eager.set_attn_implementation("eager")
    for one, drafts in ((target, False), (eager, True)):
        asked = {"output_attentions": True, "return_dict_in_generate": True, "max_new_tokens": 12, "pad_token_id": 0}
        asked |= {"do_sample": False}
        assistant = OnlineAssistant(draft, lookahead="constant", **ALONE)
        plain, ours = one.generate(PROMPTS[0], **asked), one.generate(PROMPTS[0], assistant_model=assistant, **asked)
        assert torch.equal(plain.sequences, ours.sequences)
        assert [len(a) for a in ours.attentions] == [len(a) for a in plain.attentions]
        assert (assistant.stats.total.accepted > 0) == drafts
        assert assistant.stats.total.plain_requests == (not drafts)


def test_stop_strings(target, draft, serve_as_plain, tokenizer):
    plain = target.generate(PROMPTS[0], max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 6:]
    for at in (2, 5, 9):
        stop = {"stop_strings": [tokenizer.decode(plain[at])], "tokenizer": tokenizer}
        served = serve_as_plain(target, draft, PROMPTS[:1], ALONE, **stop)
        assert served.outputs[0].shape[1] <= 6 + at + 1
        check_states(target, served.feedback[0])


@pytest.mark.parametrize("learn", ["inline", "background"])
def test_learning_in_between(target, serve_as_plain, learn):
    """Each call drafts with the weights that it began with, and the output is the target's whatever they are."""
    assistant = OnlineAssistant(
        grow_feature_draft(target), lookahead="constant", gate=False, learning_budget=1.0, seed=0, learn=learn,
        **ALONE, **LEARNS,
    )  # fmt: skip
    for _ in range(3):
        serve_as_plain(target, assistant, PROMPTS)
        assistant.flush()
    assert assistant.stats.failed_updates == 0
    assert assistant.stats.draft_version > 1
    assert assistant.stats.last.accepted > 0
    assistant.close()


def test_threads_while_it_learns(target, serve_as_plain):
    assistant = OnlineAssistant(
        grow_feature_draft(target), lookahead="constant", gate=False, learning_budget=1.0, seed=0, **ALONE, **LEARNS
    )
    plain = [target.generate(p, max_new_tokens=24, do_sample=False, pad_token_id=0).tolist() for p in PROMPTS]
    found = {}

    def serve(i):
        asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        for _ in range(3):
            found.setdefault(i, []).append(target.generate(PROMPTS[i], assistant_model=assistant, **asked).tolist())

    assert in_threads(*(partial(serve, i) for i in range(3))) == []
    assert found == {i: [plain[i]] * 3 for i in range(3)}
    assistant.flush()
    for feedback in assistant.buffer.requests():
        check_states(target, feedback)


def test_sampling_is_exact_while_it_learns_and_the_cache_ends_blocks(tiny_llama):
    target = tiny_llama(layers=3, vocab=5, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    draft = fitted(target, [torch.tensor([[1, 2, 3]])], n=8, steps=20)
    config = {"learn": "inline", "suffix_cache": True, "lookahead": "cost", "draft_cost": 0.05, "verify_cost": 0.01}
    config |= {"gate": False, "learning_rate": 1e-3}

    def learn(assistant, i):
        if i % 80 == 79:
            assistant.flush()

    assistant = check_sampling(target, draft, 3, 160, 2, config=config, between=learn)
    assert assistant.stats.draft_version > 0


@pytest.mark.parametrize(("n", "new"), [(1, 1), (1, 2), (2, 1), (2, 2), (6, 1), (40, 2)])
@pytest.mark.parametrize("positions", [0, 2, 256])
def test_near_empty_answers_and_cut_prompts_teach_what_there_is(target, serve_as_plain, n, new, positions):
    """With more unrolled steps than such a request has columns."""
    prompts = torch.randint(3, 60, (2, 1, n), generator=torch.Generator().manual_seed(n))
    config = {**ALONE, **LEARNS, "unrolled_steps": 8, "prompt_positions": positions, "update_interval": 10**6}
    served = serve_as_plain(target, grow_feature_draft(target), prompts, config, max_new_tokens=new)
    for feedback in served.feedback:
        check_states(target, feedback)
        first = max(n - positions - 2, 0)
        assert feedback.states.start == first
        of_prompt = 0 if feedback.prompt_rows is None else len(feedback.prompt_rows)
        assert feedback.num_teaching("all", states=True) == min(n + new - 2, of_prompt + new)
    served.assistant.flush()
    assert served.stats.failed_updates == 0
    assert served.stats.updates == (n + new > 2)
    assert all(bool(p.isfinite().all()) for p in served.assistant.serving.active.parameters())


# Planted bugs of what is kept.


def kept_one_later(monkeypatch):
    original = CallRecorder.add_states
    monkeypatch.setattr(CallRecorder, "add_states", lambda self, states, n: original(self, states.roll(1, 0), n))


def the_last_round_is_kept_twice(monkeypatch):
    original = CallRecorder.to_feedback

    def to_feedback(self, shared=0):
        self._states.append(self._states[-1])
        return original(self, shared)

    monkeypatch.setattr(CallRecorder, "to_feedback", to_feedback)


def cut_prompts_begin_one_later(monkeypatch):
    original = CallRecorder._kept_states
    monkeypatch.setattr(CallRecorder, "_kept_states", lambda self: original(self).moved(1))


def a_drafted_token_is_kept(monkeypatch):
    from hf_osd.generation.candidates import OnlineCandidateGenerator

    original = OnlineCandidateGenerator._keep_states

    def keep(self, outputs):
        self._new_states += self._new_states > 0
        original(self, outputs)

    monkeypatch.setattr(OnlineCandidateGenerator, "_keep_states", keep)


@pytest.mark.parametrize(
    "plant",
    [kept_one_later, the_last_round_is_kept_twice, cut_prompts_begin_one_later, a_drafted_token_is_kept],
    ids=lambda plant: plant.__name__,
)
def test_planted_bugs_are_caught_by_what_is_kept(target, draft, serve, plant, monkeypatch):
    plant(monkeypatch)
    served = serve(target, draft, PROMPTS[2:], ALONE)
    with pytest.raises((AssertionError, IndexError)):
        check_states(target, served.feedback[0])
