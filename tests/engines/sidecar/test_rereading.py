"""Answers read once more with a copy of the target: what they teach is what serving would have kept, within its share of the time."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_osd import OnlineConfig, grow_feature_draft, load_feature_draft, record_answers
from hf_osd.engines.sidecar.rereading import AnswerReader, Served

from .conftest import FakePusher
from .fake_engine import FakeEngine
from .test_sidecar import PROMPTS, ask, step

CONFIG = OnlineConfig(top_k=16, feedback_dtype="float32", prompt_positions=8)


@pytest.fixture(scope="module")
def feature_draft(target):
    return grow_feature_draft(target, [1, 2])


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1)
    ).eval()


def served(answers, sampled=False):
    return [Served(one.tokens[: one.prompt_length].tolist(), one.answer.tolist(), sampled) for one in answers]


def prompts_of(lengths):
    random = torch.Generator().manual_seed(1)
    return [torch.randint(2, 64, (length,), generator=random) for length in lengths]


@pytest.mark.parametrize("family", ["llama", "learned positions"])
@pytest.mark.parametrize("lengths", [[5], [3, 12, 7, 1], [20, 4]])
def test_it_is_what_recording_keeps(target, feature_draft, family, lengths):
    """Prompts of several lengths in one forward, some shorter and some longer than what may teach of them."""
    if family != "llama":
        target = gpt2()
        feature_draft = grow_feature_draft(target, [1, 2])
    layers = feature_draft.config.recorded_layers
    how = {"top_k": 16, "dtype": torch.float32, "prompt_positions": 8, "states_of": layers}
    recorded = {len(one.tokens): one for one in record_answers(target, prompts_of(lengths), 9, **how)}
    read = list(AnswerReader(target, feature_draft, CONFIG, 1.0).read(served(recorded.values())))
    assert len(read) == len(lengths)
    for one in read:
        expected = recorded[len(one.tokens)]
        assert torch.equal(one.tokens, expected.tokens)
        assert torch.equal(one.top_ids, expected.top_ids)
        torch.testing.assert_close(one.top_logps, expected.top_logps, atol=1e-4, rtol=1e-4)
        assert (one.prompt_rows is None) == (expected.prompt_rows is None)
        if one.prompt_rows is not None:
            assert torch.equal(one.prompt_rows.top_ids, expected.prompt_rows.top_ids)
        assert one.states.stop == expected.states.stop == len(one.tokens) - 1
        assert one.states.start == max(one.prompt_length - 10, 0)
        positions = torch.arange(one.states.start, one.states.stop)
        ours, theirs = (states.select(positions) for states in (one.states, expected.states))
        # A state that lies between two codes may fall to either side.
        assert (ours.codes.int() - theirs.codes.int()).abs().max() <= 1
        torch.testing.assert_close(ours.scales, theirs.scales, atol=1e-3, rtol=1e-3)


def test_a_draft_that_reads_no_states_gets_none(target, draft):
    [one] = AnswerReader(target, draft, CONFIG, 1.0).read([Served([5, 6, 7], [8, 9], True)])
    assert one.states is None
    assert one.sampled
    assert len(one.prompt_rows) == 2


def test_what_prompts_share_is_learnt_once(target, draft):
    reader = AnswerReader(target, draft, CONFIG, 1.0)
    [first] = reader.read([Served([5, 6, 7, 8], [9], False)])
    [second] = reader.read([Served([5, 6, 7, 3], [9], False)])
    assert (len(first.prompt_rows), len(second.prompt_rows)) == (3, 1)


def test_it_keeps_within_its_share_of_the_time(target, draft):
    now = [100.0]

    def forward(*args):
        now[0] += 3.0

    reader = AnswerReader(target, draft, CONFIG, 0.25, clock=lambda: now[0])
    handle = target.register_forward_pre_hook(forward)
    assert reader.rest == 0
    list(reader.read([Served([5, 6], [7], False)]))
    handle.remove()
    assert (reader.seconds, reader.rest) == (3.0, 9.0)
    now[0] += 9
    assert reader.rest == 0


def test_long_answers_are_read_apart(target, draft):
    calls = []
    handle = target.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    answers = [Served([5] * length, [7, 8], False) for length in (500, 10, 700)]
    read = list(AnswerReader(target, draft, OnlineConfig(prompt_positions=0), 1.0).read(answers))
    handle.remove()
    assert [tuple(shape) for shape in calls] == [(2, 502), (1, 702)]
    assert all(one.prompt_rows is None and len(one) == 2 for one in read)


@pytest.mark.parametrize("share", [0, -1, 1.5])
def test_a_share_is_a_share(target, draft, share):
    with pytest.raises(ValueError, match="share"):
        AnswerReader(target, draft, CONFIG, share)


def test_a_draft_of_another_target_is_refused(tiny_llama, feature_draft):
    with pytest.raises(ValueError, match="reads the states"):
        AnswerReader(tiny_llama(hidden=48), feature_draft, CONFIG, 1.0)


def test_engines_are_asked_for_ids_alone_and_a_feature_draft_learns(
    target, feature_draft, through, make_sidecar, tmp_path, answers_with_states
):
    """And is pushed in the layout that they read."""
    pusher, config = FakePusher(tmp_path), {"learning_rate": 1e-2, "ema_decay": 0}
    reader = AnswerReader(target, feature_draft, OnlineConfig(), 1.0)
    sidecar = make_sidecar(
        pusher=pusher, draft=feature_draft, options={"reader": reader, "layout": "eagle3"}, **config
    )
    engine = FakeEngine(target)
    send = through(engine, sidecar)
    for _ in range(3):
        ask(send)
        step(sidecar)
    assert sidecar.counts["errors"] == sidecar.counts["unreadable"] == 0
    assert sidecar.counts["taught"] == 24
    assert not any("logprobs" in body for _, _, body in engine.seen)
    assert sidecar.figures()["rereading_seconds"] > 0
    learnt = load_feature_draft(pusher.saved[-1], target)
    from hf_osd import OnlineAssistant

    prompts = [torch.tensor([ord(c) - 0x4E00 for c in prompt]) for prompt in PROMPTS]
    held = record_answers(target, prompts, 12, states_of=feature_draft.config.recorded_layers)
    before, after = (torch.cat(OnlineAssistant(d, learn=False).score(held)).nanmean() for d in (feature_draft, learnt))
    assert after > before + 0.2


def test_answers_wait_while_the_reader_rests(target, draft, through, make_sidecar):
    reader = AnswerReader(target, draft, OnlineConfig(), 1.0)
    sidecar = make_sidecar(options={"reader": reader})
    ask(through(FakeEngine(target), sidecar), PROMPTS[:2], 4)
    reader._next += 1000
    sidecar._ends.set()  # no waiting here
    assert sidecar._next_answers() == []
    assert sidecar.figures()["waiting"] == 2
    reader._next -= 1000
    assert len(sidecar._next_answers()) == 2
