"""`Rehearsal`: the target answers its traffic again, each prompt once, and the draft learns from that; nothing that is to be left alone is touched."""

import pytest
import torch

from hf_osd import OnlineAssistant, OnlineConfig, Rehearsal, grow_draft

from ..served import PROMPTS, serve


@pytest.fixture(scope="module")
def target(tiny_llama):
    """Answers do not end early."""
    return tiny_llama(layers=3, eos_token_id=None)


def assistant_of(draft, **config) -> OnlineAssistant:
    settings = {"update_interval": 10**6, "gate": False, "learning_rate": 5e-3, "seed": 0, "top_k": 64}
    return OnlineAssistant(draft, OnlineConfig(**settings | {"feedback_dtype": "float32"} | config))


def prompts_of(requests) -> list[list[int]]:
    return [request.tokens[: request.prompt_length].tolist() for request in requests]


def test_each_prompt_is_answered_again_once_the_latest_first(target, draft):
    assistant = assistant_of(draft)
    rehearsal = Rehearsal(assistant, target)
    assert rehearsal.run() == 0
    serve(target, assistant, PROMPTS[:5])
    counts = [rehearsal.run(most=2) for _ in range(4)]
    assert counts == [2, 2, 1, 0]
    answers = assistant.buffer.requests()[5:]
    assert prompts_of(answers) == [PROMPTS[i][0].tolist() for i in (4, 3, 2, 1, 0)]
    assert {len(answer) for answer in answers} == {16}
    serve(target, assistant, PROMPTS[5:6])
    assert rehearsal.run(max_new_tokens=3) == 1
    assert len(assistant.buffer.requests()[-1]) == 3


def test_several_times_each_comes_after_once_each(target, draft):
    assistant = assistant_of(draft)
    rehearsal = Rehearsal(assistant, target, times=2)
    serve(target, assistant, PROMPTS[:3])
    assert [rehearsal.run(most=2) for _ in range(4)] == [2, 2, 2, 0]
    answered = prompts_of(assistant.buffer.requests()[3:])
    assert answered == [PROMPTS[i][0].tolist() for i in (2, 1, 0, 2, 1, 0)]


def test_answers_are_sampled_and_say_what_the_target_says_there(target, draft):
    torch.manual_seed(0)
    assistant = assistant_of(draft)
    serve(target, assistant, PROMPTS[:4])
    assert Rehearsal(assistant, target, temperature=1.5).run() == 4
    served, again = assistant.buffer.requests()[:4], assistant.buffer.requests()[4:]
    assert all(one.answer.tolist() != other.answer.tolist() for one, other in zip(served[::-1], again, strict=True))
    for answer in again:
        assert answer.sampled
        with torch.no_grad():
            logits = target(answer.tokens[None].long(), use_cache=False).logits[0, answer.prompt_length - 1 : -1]
        dense = torch.zeros_like(logits).scatter(-1, answer.top_ids.long(), answer.top_logps)
        torch.testing.assert_close(dense, logits.log_softmax(-1), atol=1e-4, rtol=1e-4)


def test_they_are_learnt_when_an_update_is_due_and_are_no_traffic(target, draft):
    assistant = assistant_of(draft, update_interval=6)
    serve(target, assistant, PROMPTS[:4])
    requests, rehearsal = assistant.stats.total.requests, Rehearsal(assistant, target)
    assert rehearsal.run(most=1) == 1
    assert assistant.stats.updates == 0
    assert rehearsal.run(most=1) == 1
    assert assistant.stats.updates == 1
    assert assistant.stats.total.requests == requests == 4
    assert assistant.buffer.new() == []


@pytest.mark.parametrize("learn", ["inline", "background"])
def test_the_draft_gets_better_at_what_the_target_might_have_said(target, learn):
    torch.manual_seed(0)
    config = {"learning_rate": 1e-3, "replay_ratio": 0.0, "ema_decay": 0.0, "warmup_steps": 0}
    with assistant_of(grow_draft(target), learn=learn, **config) as assistant:
        serve(target, assistant, PROMPTS[:4])
        assistant.collect()
        assistant.buffer.mark_seen(assistant.buffer.new())  # what was served teaches nothing here
        assert Rehearsal(assistant, target).run() == 4
        answers = assistant.buffer.new()
        before = torch.cat(assistant.score(answers)).nanmean()
        assert assistant.flush()
        for _ in range(5):
            # Another one each time, that knows of nothing that was done.
            assert Rehearsal(assistant, target).run() == 4
            assert assistant.flush()
        assert torch.cat(assistant.score(answers)).nanmean() > before + 0.05


def test_what_is_private_is_left_alone(target, draft):
    assistant = assistant_of(draft)
    serve(target, assistant, PROMPTS[:3])
    serve(target, assistant.private(), PROMPTS[6:8])
    assert Rehearsal(assistant, target).run(most=100) == 3
    answered = prompts_of(assistant.buffer.requests()[3:])
    assert not any(prompt[0].tolist() in answered for prompt in PROMPTS[6:8])


@pytest.mark.parametrize("rate", ["auto", 5e-3])
def test_nothing_of_it_is_judged_by(target, draft, rate):
    """What the target says to a prompt that was learnt speaks for whatever has learnt it."""
    assistant = assistant_of(draft, gate=True, learning_rate=rate)
    serve(target, assistant, PROMPTS[:6])
    assert Rehearsal(assistant, target).run(most=100) == 6
    assistant.flush()
    assert assistant.buffer.new() == []
    contenders = assistant.learner.contenders
    assert contenders.shadow.requests == (3 if rate == "auto" else 6), "of the others a rate was tried on"
    assert len(contenders.remembered) == 6
    serve(target, assistant, PROMPTS[6:8])
    assert Rehearsal(assistant, target).run(most=100) == 8
    judged = contenders.shadow.requests
    assistant.flush()
    assert contenders.shadow.requests == judged + 2
    assert assistant.stats.updates == 2


def test_nor_is_a_request_that_was_more_than_tokens(target, draft):
    """The target read embeddings: other ones than its own here, of which feedback has nothing."""
    assistant = assistant_of(draft)
    embeds = target.get_input_embeddings()(PROMPTS[0]) + 0.5
    target.generate(PROMPTS[0], inputs_embeds=embeds, assistant_model=assistant, max_new_tokens=4, do_sample=False)
    assistant.collect()
    assert len(assistant.buffer) == 1, "it teaches"
    assert Rehearsal(assistant, target).run() == 0


def test_nor_one_that_was_kept_over_a_restart(target, draft, tmp_path):
    before, after = assistant_of(draft), assistant_of(draft)
    serve(target, before, PROMPTS[:2])
    before.collect()
    before.buffer.save(tmp_path / "buffer.safetensors")
    after.buffer.restore(tmp_path / "buffer.safetensors")
    assert Rehearsal(after, target).run() == 0


def test_an_answer_longer_than_the_drafts_window_is_not_learnt(target):
    short = grow_draft(target)
    short.config.max_position_embeddings = 24
    assistant = assistant_of(short)
    serve(target, assistant, PROMPTS[:2])
    rehearsal = Rehearsal(assistant, target, times=2)
    assert rehearsal.run(max_new_tokens=30) == 2
    assert len(assistant.buffer) == 2
    assert rehearsal.run() == 2
    assert len(assistant.buffer) == 4


def test_what_cannot_be_rehearsed_is_refused(target, draft, tiny_llama):
    for config in ({"learn": "off"}, {"learn": "process"}):
        with assistant_of(draft, **config) as assistant, pytest.raises(ValueError, match="learn='inline'"):
            Rehearsal(assistant, target)
    assistant = assistant_of(draft)
    with pytest.raises(ValueError, match="vocabulary of 64 and the target of 80"):
        Rehearsal(assistant, tiny_llama(vocab=80))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="above 0"):
            Rehearsal(assistant, target, temperature)
    with pytest.raises(ValueError, match="`times` is 0"):
        Rehearsal(assistant, target, times=0)
    with pytest.raises(ValueError, match="this process"):
        Rehearsal(OnlineAssistant(), target)
