"""`FeedbackCollator`: which column predicts which answer, of requests of unlike length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.distill.collator import FeedbackCollator
from hf_osd.feedback.feedback import ACCEPTED

# (prompt, answer, and how many of the prompt's positions have a target, where it has as many)
shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=5)


@given(shapes=shapes, positions=st.sampled_from(["all", "error"]))
def test_every_row_is_the_column_before_its_answer(make_feedback, shapes, positions):
    """The off-by-one that distils each token onto its neighbour and still looks like learning."""
    requests = [
        make_feedback(n=n, prompt=prompt, prompt_rows=min(m, prompt - 1), seed=i)
        for i, (prompt, n, m) in enumerate(shapes)
    ]
    batch = FeedbackCollator(positions)(requests)
    longest, keep = max(p + n for p, n, _ in shapes), max(n + min(m, p - 1) for p, n, m in shapes)
    assert batch["keep"] == keep
    assert batch["input_ids"].shape == (len(requests), longest - 1)
    at, chosen = 0, batch["rows"].tolist()
    for b, request in enumerate(requests):
        read = 0 if request.prompt_rows is None else len(request.prompt_rows)
        for i in range(-read, len(request)):
            if i >= 0 and positions == "error" and request.outcome[i] == ACCEPTED:
                continue
            rows, at_row = (request.rows, i) if i >= 0 else (request.prompt_rows, read + i)
            column = longest - 1 - keep + chosen[at] - b * keep  # of input_ids
            seen = batch["input_ids"][b, : column + 1][batch["attention_mask"][b, : column + 1].bool()]
            assert torch.equal(seen, request.tokens[: request.prompt_length + i].long()), "what the row has seen"
            assert batch["labels"][b, column + 1] == request.tokens[request.prompt_length + i], "what it is to predict"
            assert torch.equal(batch["top_ids"][at], rows.top_ids[at_row].long())
            assert torch.equal(batch["top_logps"][at], rows.top_logps[at_row].float())
            assert batch["tail_logp"][at] == rows.tail_logp[at_row].float()
            at += 1
        assert request.num_teaching(positions) == int((batch["labels"][b] != -100).sum())
    assert at == len(chosen) == len(batch["top_ids"]) == len(batch["tail_logp"])
    assert (batch["labels"] != -100).sum() == at, "Trainer averages over as many items as there are rows"
    assert (batch["labels"][:, 1:] != -100).sum() == at, "and also when it leaves out the first column"


def test_prompts_are_left_out_where_they_are_not_asked_for(make_feedback):
    with_rows, without = make_feedback(prompt_rows=3), make_feedback()
    batch, expected = FeedbackCollator(prompts=False)([with_rows]), FeedbackCollator()([without])
    assert batch["keep"] == expected["keep"] == len(without)
    assert all(
        torch.equal(batch[name], expected[name]) for name in ("input_ids", "labels", "rows", "top_ids", "top_logps")
    )


def test_padding_is_on_the_left_and_hidden(make_feedback):
    short, long = make_feedback(n=2, prompt=3, seed=0), make_feedback(n=4, prompt=6, seed=1)
    batch = FeedbackCollator()([short, long])
    assert batch["attention_mask"].tolist() == [[0] * 5 + [1] * 4, [1] * 9]
    assert batch["position_ids"].tolist() == [[0] * 5 + [0, 1, 2, 3], list(range(9))]
    assert batch["input_ids"][0, 5:].tolist() == short.tokens[:-1].tolist()


def test_error_positions_alone_are_stacked(make_feedback):
    request = make_feedback(n=30, seed=1)
    errors = (request.outcome != ACCEPTED).nonzero().squeeze(-1)
    assert 0 < len(errors) < 30
    batch = FeedbackCollator("error")([request])
    assert batch["rows"].tolist() == errors.tolist()
    assert torch.equal(batch["top_ids"], request.top_ids[errors].long())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_feedback_becomes_float32(make_feedback, dtype):
    batch = FeedbackCollator()([make_feedback(dtype=dtype)])
    assert batch["top_logps"].dtype == batch["tail_logp"].dtype == torch.float32
    assert batch["top_ids"].dtype == batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(("longest", "columns"), [(65, 65), (64, 63), (66, 65), (193, 193)])
def test_sixty_four_columns_become_one_more(make_feedback, longest, columns):
    """With a mask cuDNN's attention has NaN for gradients there. What is taught, and where, is the same."""
    requests = [make_feedback(n=12, prompt=longest - 12, seed=0), make_feedback(n=8, prompt=20, seed=1)]
    batch = FeedbackCollator()(requests)
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, columns)
    assert batch["attention_mask"].sum(-1).tolist() == [longest - 1, 27]
    assert batch["labels"][batch["labels"] != -100].tolist() == [
        *requests[0].answer.tolist(),
        *requests[1].answer.tolist(),
    ]
    read = batch["rows"] % batch["keep"] + columns - batch["keep"]  # the column of each row
    ids = batch["input_ids"][(batch["rows"] >= batch["keep"]).long(), read].tolist()
    before = [request.tokens[request.prompt_length - 1 : -1].tolist() for request in requests]
    assert ids == before[0] + before[1]
