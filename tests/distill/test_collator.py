"""`FeedbackCollator`: which column predicts which answer, of requests of unlike length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.distill.collator import FeedbackCollator
from hf_osd.feedback import ACCEPTED

shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=5)  # (prompt, answer)


@given(shapes=shapes, positions=st.sampled_from(["all", "error"]))
def test_every_row_is_the_column_before_its_answer(make_feedback, shapes, positions):
    """The off-by-one that distils each token onto its neighbour and still looks like learning."""
    requests = [make_feedback(n=n, prompt=prompt, seed=i) for i, (prompt, n) in enumerate(shapes)]
    batch = FeedbackCollator(positions)(requests)
    longest, keep = max(p + n for p, n in shapes), max(n for _, n in shapes)
    assert batch["keep"] == keep
    assert batch["input_ids"].shape == (len(requests), longest - 1)
    at, rows = 0, batch["rows"].tolist()
    for b, request in enumerate(requests):
        for i in range(len(request)):
            if positions == "error" and request.outcome[i] == ACCEPTED:
                continue
            column = longest - 1 - keep + rows[at] - b * keep  # of input_ids
            seen = batch["input_ids"][b, : column + 1][batch["attention_mask"][b, : column + 1].bool()]
            assert torch.equal(seen, request.tokens[: request.prompt_length + i].long()), "what the row has seen"
            assert batch["labels"][b, column + 1] == request.answer[i], "what it is to predict"
            assert torch.equal(batch["top_ids"][at], request.top_ids[i].long())
            assert torch.equal(batch["top_logps"][at], request.top_logps[i].float())
            assert batch["tail_logp"][at] == request.tail_logp[i].float()
            at += 1
    assert at == len(rows) == len(batch["top_ids"]) == len(batch["tail_logp"])
    assert (batch["labels"] != -100).sum() == at, "Trainer averages over as many items as there are rows"
    assert (batch["labels"][:, 1:] != -100).sum() == at, "and also when it leaves out the first column"


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
