"""`replay`: predictions and learning on a trace are those of serving."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd import OnlineAssistant, OnlineConfig, grow_draft, record_answers
from hf_osd.feedback.feedback import ACCEPTED, REJECTED, UNTESTED
from hf_osd.feedback.trace import read_trace, write_trace
from recipes.experiments.replaying import as_drafted, replay

PROMPTS = torch.randint(2, 64, (16, 7), generator=torch.Generator().manual_seed(4))
LONGEST = 20


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=3)


@pytest.fixture(scope="module")
def trace(target, tmp_path_factory):
    """The target's answers to all prompts, written to a file and read again."""
    path = tmp_path_factory.mktemp("trace") / "answers.safetensors"
    write_trace(path, record_answers(target, PROMPTS, LONGEST, dtype=torch.float32, prompt_positions=5))
    return read_trace(path)[0]


def learning(**config) -> OnlineConfig:
    settings = {
        "update_interval": 4,
        "learning_rate": 1e-3,
        "gate": False,
        "learning_budget": 1.0,  # else what is learnt between live calls depends on how long they took
        "seed": 0,
        "feedback_dtype": "float32",
        "prompt_positions": 5,
    }
    return OnlineConfig(
        **settings | {"lookahead": "constant", "num_assistant_tokens": 3, "suffix_cache": False} | config
    )


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gate": True, "update_interval": 2},
        {"positions": "error"},
        {"ema_decay": 0.9, "top_k": 8, "seed": 7},
        {"prompt_positions": 3},
        {"prompt_positions": 0},
    ],
)
def test_replayed_alpha_is_live_alpha_request_by_request(target, trace, config):
    draft, config = grow_draft(target), learning(**config)
    live, again = OnlineAssistant(draft, config), OnlineAssistant(draft, config)
    seen = []
    taken = live.learner.add
    live.learner.add = lambda feedback: (seen.append(feedback), taken(feedback))
    for prompt in PROMPTS:
        target.generate(prompt[None], assistant_model=live, max_new_tokens=LONGEST, do_sample=False)
        live.update()
    replayed = list(replay(again, trace, LONGEST))

    assert live.stats.updates == again.stats.updates > 2
    assert live.stats.accepted_updates == again.stats.accepted_updates
    alphas = []
    for served, request in zip(seen, replayed, strict=True):
        assert torch.equal(served.tokens, request.tokens)
        assert torch.equal(served.overlap[:-1], request.overlap[:-1])  # the last is put to no draft while serving
        assert torch.equal(served.outcome, request.outcome)
        assert served.num_teaching("all") == request.num_teaching("all") == len(served) + config.prompt_positions
        alphas.append(float(request.overlap.mean()))
    assert max(alphas) > min(alphas)
    for (name, a), (_, b) in zip(live.serving.weights(), again.serving.weights(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3, msg=name)


def test_no_target_and_no_prediction_that_was_learnt_first(target, trace):
    """The first requests are scored by the draft as it came; the later ones by what had been learnt until then and no more."""
    assistant = OnlineAssistant(grow_draft(target), learning())
    fresh = assistant.score(trace[:4])
    for i, request in enumerate(replay(assistant, trace)):
        if i < 4:
            assert torch.equal(request.overlap, fresh[i])
        if i == 3:
            after = assistant.score(trace[4:8])
        if 4 <= i < 8:
            assert torch.equal(request.overlap, after[i - 4])


def test_other_answers_are_learnt_beside_their_requests(target, trace):
    """None is judged by, or counted as a request."""
    other = [record_answers(target, PROMPTS, LONGEST, dtype=torch.float32, temperature=1.0) for _ in range(2)]
    other = list(zip(*other, strict=True))
    assistant, alone = (
        OnlineAssistant(grow_draft(target), learning(gate=True, top_k=5, update_interval=6)) for _ in range(2)
    )
    replayed = list(replay(assistant, trace, LONGEST, other))
    assert len(replayed) == len(list(replay(alone, trace, LONGEST))) == len(trace)
    expected = []
    for request, answers in zip(trace, other, strict=True):
        expected += [request.tokens.tolist(), *(answer.tokens.tolist() for answer in answers)]
    assert [request.tokens.tolist() for request in assistant.buffer.requests()] == expected
    assert {request.top_ids.shape[1] for request in assistant.buffer.requests()} == {5}
    assert assistant.stats.updates > alone.stats.updates
    for one in (assistant, alone):
        one.flush()
        assert one.stats.estimate.requests == one.learner.contenders.shadow.requests == len(trace)
    with pytest.raises(ValueError, match="has 15 items and there are 16 requests"):
        next(replay(alone, trace, LONGEST, other[:15]))


def test_requests_are_cut_to_the_configs_top_k(target, trace):
    assistant = OnlineAssistant(grow_draft(target), learning(top_k=5))
    assert {request.top_ids.shape[1] for request in replay(assistant, trace[:5])} == {5}


def test_sampled_answers_are_learnt_as_well(target):
    """Their α is Σ min(p, q), and which of their tokens were accepted is drawn with it."""
    sampled = record_answers(target, PROMPTS, LONGEST, dtype=torch.float32, temperature=1.0, prompt_positions=5)
    assistants = [OnlineAssistant(grow_draft(target), learning(positions=kind)) for kind in ("all", "all", "error")]
    fresh = assistants[0].score(sampled)
    first, again, error = ([*replay(one, sampled, LONGEST)] for one in assistants)
    assert all(torch.equal(one.overlap, expected) for one, expected in zip(first[:4], fresh[:4], strict=True))
    assert all(torch.equal(one.outcome, other.outcome) for one, other in zip(first, again, strict=True))
    overlap, outcome = (torch.cat([getattr(one, name) for one in first]) for name in ("overlap", "outcome"))
    assert ((overlap > 0) & (overlap < 1)).any()
    tested = outcome != UNTESTED
    share = float((outcome[tested] == ACCEPTED).float().mean())
    assert share == pytest.approx(float(overlap[tested].mean()), abs=0.15)
    assert assistants[2].stats.learned_tokens < assistants[0].stats.learned_tokens


def test_what_cannot_be_replayed_is_refused(target, trace):
    frozen = OnlineAssistant(grow_draft(target), learn=False)
    with pytest.raises(ValueError, match="does not learn"):
        next(replay(frozen, trace))


@given(hits=st.lists(st.booleans(), min_size=1, max_size=30), gamma=st.integers(1, 6), limited=st.booleans())
def test_outcomes_are_those_of_rounds(make_feedback, hits, gamma, limited):
    request = make_feedback(n=len(hits))
    overlap = torch.tensor(hits).float()
    served = as_drafted(request, overlap, gamma, len(hits) if limited else None)
    outcome = served.outcome.tolist()
    in_block = 0
    for i, (hit, seen) in enumerate(zip(hits, outcome, strict=True)):
        last = limited and i == len(hits) - 1
        if in_block == gamma or last:
            assert seen == UNTESTED
            in_block = 0
        else:
            assert seen == (ACCEPTED if hit else REJECTED)
            in_block = in_block + 1 if hit else 0
    assert torch.equal(served.overlap, overlap)
    ends = [i for i, seen in enumerate(outcome) if seen != ACCEPTED]
    assert served.teaching_mask("error").nonzero().flatten().tolist() == ends


def test_rounds_are_of_the_targets_tokens_where_one_is_several_of_the_drafts(target):
    [request] = record_answers(target, PROMPTS[:1], 4)
    rest = torch.tensor([False, True, False, False])[: len(request)]
    spelled = dataclasses.replace(request, tail_logp=request.tail_logp.masked_fill(rest, torch.nan))
    overlap = torch.tensor([0.0, torch.nan, 1.0, 1.0])[: len(request)]
    assert as_drafted(spelled, overlap, gamma=3).outcome.tolist() == [REJECTED, UNTESTED, ACCEPTED, ACCEPTED]
