"""`FeatureCollator`: which column reads which token and state, and predicts which token, of requests of unlike length and with states of some positions alone."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.distill.feature_collator import FeatureCollator
from hf_osd.distill.windows import cut
from hf_osd.feedback.feedback import ACCEPTED
from hf_osd.feedback.target_states import TargetStates

WIDTH = 6


def with_states(request, start: int, stop: int):
    """The same request with states of these positions, whose largest number is the position + 1."""
    stop = min(stop, len(request.tokens))
    if stop <= start:
        return request
    rows = torch.full((stop - start, WIDTH), 0.5)
    rows[:, [2, -1]] = torch.arange(start, stop)[:, None] + 1.0
    return replace(request, states=TargetStates.from_states(rows, 2, start))


shapes = st.lists(
    # prompt, answer, prompt rows, the first position with a state, and how many have one
    st.tuples(st.integers(1, 9), st.integers(0, 7), st.integers(0, 9), st.integers(0, 6), st.integers(0, 18)),
    min_size=1,
    max_size=5,
)


@given(shapes=shapes, positions=st.sampled_from(["all", "error"]), prompts=st.booleans())
def test_each_column_reads_a_token_and_the_state_before_it_and_predicts_the_token_after_it(
    make_feedback, shapes, positions, prompts
):
    """An off-by-one here would be learnt, and look like learning."""
    requests = [
        with_states(make_feedback(n=n, prompt=prompt, prompt_rows=min(m, prompt - 1), seed=i), start, start + count)
        for i, (prompt, n, m, start, count) in enumerate(shapes)
    ]
    batch = FeatureCollator(WIDTH, positions, prompts)(requests)
    (height, width), keep = batch["input_ids"].shape, batch["keep"]
    assert height == len(requests)
    assert batch["features"].shape == (height, width, WIDTH)
    assert batch["labels"].shape == (height, width + 1)
    at = 0
    for b, request in enumerate(requests):
        length, start = len(request.tokens), request.prompt_length
        states = {} if request.states is None else {request.states.start + i for i in range(len(request.states))}
        columns = [j for j in range(1, length - 1) if j - 1 in states]
        padding = width - len(columns)
        assert batch["attention_mask"][b].tolist() == [0] * padding + [1] * len(columns)
        assert not batch["features"][b, :padding].any()
        assert batch["input_ids"][b, padding:].tolist() == [int(request.tokens[j]) for j in columns]
        assert batch["position_ids"][b, padding:].tolist() == [j - 1 for j in columns]
        read = (batch["features"][b, padding:, -1] - 1).round().int().tolist()
        assert read == [j - 1 for j in columns]
        rows = [] if request.prompt_rows is None or not prompts else range(start - len(request.prompt_rows), start)
        rows = [i for i in [*rows, *range(start, length)] if i - 1 in columns]
        for i in rows:
            if i >= start and positions == "error" and request.outcome[i - start] == ACCEPTED:
                continue
            column = int(batch["rows"][at]) - b * keep + width - keep
            assert column - padding == columns.index(i - 1) == int(batch["depth"][at])
            assert batch["labels"][b, column + 1] == request.tokens[i]
            kept = request.rows if i >= start else request.prompt_rows
            row = i - start if i >= start else i - start + len(request.prompt_rows)
            assert torch.equal(batch["top_ids"][at], kept.top_ids[row].long())
            assert torch.equal(batch["top_logps"][at], kept.top_logps[row].float())
            assert batch["tail_logp"][at] == kept.tail_logp[row].float()
            at += 1
    assert at == len(batch["rows"]) == int((batch["labels"] != -100).sum())
    taught = sum(one.num_teaching(positions, states=True) for one in requests)
    assert taught == at or not prompts


def test_requests_without_states_teach_nothing(make_feedback):
    batch = FeatureCollator(WIDTH)([make_feedback(), make_feedback(seed=1, prompt_rows=3)])
    assert len(batch["rows"]) == 0
    assert not batch["attention_mask"].any()
    assert batch["features"].shape == (2, 1, WIDTH)
    assert (batch["labels"] == -100).all()


def test_a_position_without_a_target_does_not_teach(make_feedback):
    request = with_states(make_feedback(n=6, prompt=4), 0, 9)
    request.tail_logp[2] = torch.nan
    batch = FeatureCollator(WIDTH)([request])
    assert len(batch["rows"]) == 5
    assert not batch["tail_logp"].isnan().any()


def test_states_of_other_layers_are_refused(make_feedback):
    with pytest.raises(ValueError, match="recorded_layers"):
        FeatureCollator(WIDTH + 2)([with_states(make_feedback(), 0, 9)])


@pytest.mark.parametrize("start", [0, 2, 3, 100])
def test_what_is_left_of_a_long_text_keeps_its_places(make_feedback, start):
    request = make_feedback(n=40, prompt=260, k=2)
    request.tokens.copy_(torch.arange(300, dtype=torch.int32))
    part, _ = cut(with_states(request, start, 299), 64)
    assert part.gap is not None
    batch = FeatureCollator(WIDTH)([part])
    columns = batch["attention_mask"][0].bool()
    tokens = batch["input_ids"][0, columns]
    assert torch.equal(batch["position_ids"][0, columns], tokens - 1)
    assert torch.equal((batch["features"][0, columns, -1] - 1).round().long(), tokens - 1)
    assert tokens[-1] == 298
    assert len(batch["rows"]) == 40
