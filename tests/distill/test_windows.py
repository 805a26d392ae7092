"""`cut` and `Windows`: of a long request what teaches most, at the places that it had."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd import FeedbackBuffer, OnlineAssistant, OnlineConfig, grow_draft
from hf_osd.distill.collator import FeedbackCollator
from hf_osd.distill.ensemble import make_student
from hf_osd.distill.scoring import judge
from hf_osd.distill.windows import Windows, cut
from hf_osd.feedback.feedback import ACCEPTED, REJECTED
from hf_osd.learning.learner import Learner
from hf_osd.policy.lookahead import Plan


@pytest.fixture(scope="module")
def request_of(make_feedback):
    """A request whose token at each place is the place, so that one sees where it was."""

    def make(prompt: int, n: int, **fields):
        source = fields.pop("source", None)
        request = replace(make_feedback(n=n, prompt=prompt, k=2, **fields), source=source)
        request.tokens.copy_(torch.arange(prompt + n, dtype=torch.int32))
        return request

    return make


def places(request) -> list[int]:
    """Where in the text its tokens are, by `gap`."""
    found = torch.arange(len(request.tokens))
    if request.gap is not None:
        after, count = request.gap
        found[after:] += count
    return found.tolist()


def test_what_is_no_longer_than_the_window_is_as_it_was(request_of):
    request = request_of(90, 10)
    for most in (100, 101, None):
        part, at = cut(request, most)
        assert part is request
        assert at == slice(0, 10)


def test_of_a_long_prompt_its_first_tokens_and_its_end_are_left(request_of):
    request = request_of(5000, 30)
    part, at = cut(request, 100)
    assert len(part.tokens) == 100
    assert part.tokens.tolist() == [*range(4), *range(4934, 5030)]
    assert places(part) == part.tokens.tolist()
    assert (part.prompt_length, at) == (70, slice(0, 30))
    for name in ("top_ids", "top_logps", "tail_logp", "draft_logps", "drafted", "drafted_logp", "outcome"):
        assert getattr(part, name) is not None
        assert torch.equal(getattr(part, name).nan_to_num(), getattr(request, name).nan_to_num())


def test_of_a_long_answer_some_of_it_is_left_after_what_is_only_read(request_of):
    """A quarter of the window is context, but where the text itself begins."""
    request = request_of(50, 1000)
    part, at = cut(request, 104)
    assert at.stop - at.start == len(part) == 75
    assert part.tokens[part.prompt_length :].tolist() == list(range(50 + at.start, 50 + at.stop))
    assert places(part) == part.tokens.tolist()
    assert torch.equal(part.top_ids, request.top_ids[at])
    drawn = {cut(request, 104, generator=torch.Generator().manual_seed(i))[1].start for i in range(20)}
    assert len(drawn) > 10, "another part each time"


def test_errors_alone_teach_where_they_are_densest(request_of):
    request = request_of(20, 600)
    request.outcome[:] = ACCEPTED
    request.outcome[[30, 400, 405, 411]] = REJECTED
    part, at = cut(request, 64, positions="error")
    assert part.teaching_mask("error").sum() == 3
    assert at.start <= 400
    assert at.stop > 411


def test_prompts_that_teach_are_kept_if_they_are_asked_for(request_of):
    request = request_of(3000, 6, prompt_rows=40)
    part, _ = cut(request, 128)
    assert len(part.prompt_rows) == 40
    assert torch.equal(part.prompt_rows.top_ids, request.prompt_rows.top_ids)
    narrow, at = cut(request, 48)
    assert 0 < len(narrow.prompt_rows) < 40
    first = 3000 - 40
    kept = narrow.tokens[narrow.prompt_length - len(narrow.prompt_rows) : narrow.prompt_length]
    rows = request.prompt_rows.top_ids[[int(token) - first for token in kept]]
    assert torch.equal(narrow.prompt_rows.top_ids, rows)


@given(prompt=st.integers(1, 300), n=st.integers(1, 300), most=st.integers(16, 200), rows=st.integers(0, 40))
def test_any_part_is_a_request_of_the_very_tokens_and_targets(request_of, prompt, n, most, rows):
    request = request_of(prompt, n, prompt_rows=min(rows, prompt - 1))
    for generator in (None, torch.Generator().manual_seed(n)):
        part, at = cut(request, most, generator=generator)
        assert len(part.tokens) == min(most, prompt + n)
        assert places(part) == part.tokens.tolist()
        assert part.tokens[part.prompt_length :].tolist() == list(range(prompt + at.start, prompt + at.stop))
        assert torch.equal(part.top_ids, request.top_ids[at])
        assert 0 < part.num_teaching("all") <= request.num_teaching("all")
        FeedbackCollator()([part])


def test_an_encoders_source_is_whole_and_the_answers_beginning_is_left(request_of):
    request = request_of(1, 400, source=torch.arange(900, dtype=torch.int32))
    part, at = cut(request, 64)
    assert torch.equal(part.source, request.source)
    assert (part.tokens.tolist(), at, part.gap) == (list(range(64)), slice(0, 63), None)


def test_tokens_have_the_places_that_they_had(request_of):
    part, _ = cut(request_of(500, 8), 64)
    batch = FeedbackCollator()([part, request_of(20, 4)])
    assert batch["position_ids"][0].tolist() == places(part)[:-1]
    assert batch["position_ids"][1].tolist() == [0] * (63 - 23) + list(range(23))


def test_a_model_says_of_a_window_what_it_says_with_the_same_text_before(tiny_llama, request_of):
    """With relative positions all that it reads is what counts."""
    model = tiny_llama()
    request = request_of(300, 40)
    request.tokens.remainder_(60)
    windows = Windows([request], 64)
    [judged] = windows.spread(judge(model, windows.requests))
    assert judged.overlap.shape == (40,)
    known = ~judged.overlap.isnan()
    assert known.sum() == 40
    [short] = judge(model, [cut(request, 64)[0]])
    assert torch.equal(short.overlap, judged.overlap)


def test_what_was_not_read_is_not_judged(tiny_llama, request_of):
    request = request_of(10, 200)
    request.tokens.remainder_(60)
    windows = Windows([request], 64)
    [judged] = windows.spread(judge(tiny_llama(), windows.requests))
    assert judged.overlap.shape == judged.confidence.shape == judged.shared.shape == (200,)
    assert 40 <= int((~judged.overlap.isnan()).sum()) <= 64


class Widths:
    """The longest text that a model reads, apart from what is served."""

    def __init__(self, module):
        self.widest = 0
        module.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        if "input_ids" in kwargs:
            self.widest = max(self.widest, kwargs["input_ids"].shape[1])


@pytest.mark.parametrize("window", [64, None])
def test_no_more_of_a_text_is_read_to_learn_it(target, make_feedback, window):
    draft = grow_draft(target)
    trainable = {name for name, p in draft.named_parameters() if p.requires_grad}
    config = OnlineConfig(learning_rate=1e-2, learning_window=window, update_interval=2, replay_ratio=1.0, seed=0)
    learner = Learner(make_student(draft, trainable, config), FeedbackBuffer(), lambda weights: None)
    widths = Widths(learner.student.module)
    before = learner.student.snapshot().weights
    for i in range(6):
        learner.add(make_feedback(seed=i, n=8, prompt=400))
        if i % 2:
            learner.update()
    assert (learner.updates, learner.failed) == (3, 0)
    assert widths.widest == (63 if window else 407)
    assert any((before[name] != w).any() for name, w in learner.student.weights().items())


def test_a_call_that_drafted_nothing_is_judged_by_a_window(target, monkeypatch):
    assistant = OnlineAssistant(grow_draft(target), learning_window=64, update_interval=10**6)
    monkeypatch.setattr(assistant.lookahead, "plan", lambda *args, **kwargs: Plan())
    widths = Widths(assistant.serving.active)
    prompt = torch.randint(2, 60, (1, 300))
    target.generate(prompt, assistant_model=assistant, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assistant.collect()
    assert widths.widest == 63
