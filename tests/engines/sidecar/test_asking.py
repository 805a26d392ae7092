"""What is added to a request, and that nothing of it is left in the answer."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.engines.sidecar.answers import to_feedback
from hf_osd.engines.sidecar.asking import CHAT, COMPLETIONS, StreamCutter, ask, cut

CHAT_REQUEST = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
REQUEST = {"model": "tiny", "prompt": "hello", "max_tokens": 4}
ALL = frozenset({"logprobs", "token_ids", "prompt_token_ids"})


def asked(request, path=COMPLETIONS, **options):
    return ask(path, json.dumps(request).encode(), 20, **options)


@pytest.mark.parametrize(("path", "request_"), [(COMPLETIONS, REQUEST), (CHAT, CHAT_REQUEST)])
def test_a_request_keeps_its_fields_and_asks_for_what_teaches(path, request_):
    body = json.loads(asked(request_, path).body)
    assert {name: body[name] for name in request_} == request_
    assert body["return_token_ids"] is True
    assert (body["top_logprobs"] if path == CHAT else body["logprobs"]) == 20


@pytest.mark.parametrize(
    "more",
    [
        {"n": 2},
        {"best_of": 2},
        {"echo": True},
        {"logprobs": 0},
        {"logprobs": 3},
        {"prompt_logprobs": 1},
        {"suffix": "x"},
        {"prompt": ["a", "b"]},
        {"prompt": [[1, 2]]},
        {"prompt": None, "prompt_embeds": "x"},
        {"model": "an adapter"},
    ],
)
def test_completions_that_cannot_be_read_pass_as_they_are(more):
    assert asked({**REQUEST, **more}, model="tiny") is None


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function"}]},
        {"n": 3},
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        {"messages": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "tool", "content": "1"}]},
    ],
)
def test_chats_that_cannot_be_read_pass_as_they_are(more):
    assert asked({**CHAT_REQUEST, **more}, CHAT) is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 10**5])
def test_what_is_no_request_passes(body):
    assert ask(COMPLETIONS, body, 20) is None


def test_other_paths_pass():
    assert ask("/v1/embeddings", json.dumps(REQUEST).encode(), 20) is None


@pytest.mark.parametrize(
    ("more", "sampled"),
    [
        ({}, True),
        ({"temperature": 0}, False),
        ({"temperature": 0.7}, True),
        ({"top_k": 1}, False),
        ({"temperature": None}, True),
    ],
)
def test_a_request_is_sampled_unless_it_says_otherwise(more, sampled):
    assert asked({**REQUEST, **more}).sampled is sampled


def test_ids_that_the_client_asked_for_stay():
    assert asked({**REQUEST, "return_token_ids": True}).cuts == {"logprobs"}


words = st.text(max_size=12) | st.sampled_from(
    ['"token_ids":[1]', ',"logprobs":{}', '\\"', '{"token_ids": [1]}', ',"token_ids":']
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "logprobs": st.none() | st.dictionaries(words, st.lists(st.floats() | words, max_size=3), max_size=3),
        "token_ids": st.none() | st.lists(st.integers(0, 9), max_size=3),
        "prompt_token_ids": st.none() | st.lists(st.integers(0, 9), max_size=3),
    },
)


@given(fields, words, st.booleans(), st.sampled_from([(",", ":"), (", ", ": ")]))
def test_cutting_changes_nothing_but_the_fields_values(values, text, ascii_, separators):
    def dumped(values):
        message = {"text": text, **values, "after": [text, 1e-7, {"x": text}]}
        return json.dumps({"id": text, "choices": [message]}, ensure_ascii=ascii_, separators=separators)

    rest, found = cut(dumped(values), ALL)
    assert rest == dumped(dict.fromkeys(values))
    assert repr(found) == repr({name: value for name, value in values.items() if value is not None})


def test_a_field_that_stays_is_read_all_the_same():
    text = '{"choices":[{"logprobs":{"x":1},"token_ids":[7]}]}'
    assert cut(text, frozenset({"logprobs"})) == (
        '{"choices":[{"logprobs":null,"token_ids":[7]}]}',
        {"logprobs": {"x": 1}, "token_ids": [7]},
    )


@given(st.data())
def test_a_stream_is_cut_wherever_it_is_broken_up(data):
    chunk = '{{"choices":[{{"text":"é{}","logprobs":{},"finish_reason":null,"token_ids":{}}}]}}'
    events = [": keep-alive", *(f"data: {chunk.format(i, '{}', f'[{i}]')}" for i in range(3)), "data: [DONE]"]
    sent = "".join(f"{event}\n\n" for event in events).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)), max_size=6)))
    cutter = StreamCutter(asked({**REQUEST, "stream": True}))
    got = b"".join(cutter.feed(sent[a:b]) for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)) + cutter.rest()
    bare = [": keep-alive", *(f"data: {chunk.format(i, 'null', 'null')}" for i in range(3)), "data: [DONE]"]
    assert got.decode() == "".join(f"{event}\n\n" for event in bare)
    assert [one["token_ids"] for one in cutter.values] == [[0], [1], [2]]
    assert cutter.finished


def values_of(logits, answer, k, chat):
    """What an engine sends of an answer, as completions or as a chat."""
    logps = logits.log_softmax(-1)
    rows = [
        {int(i): float(row[i]) for i in dict.fromkeys([int(token), *row.topk(k).indices.tolist()])}
        for row, token in zip(logps, answer, strict=True)
    ]
    if chat:
        named = [[{"token": f"token_id:{i}", "logprob": p} for i, p in row.items()] for row in rows]
        logprobs = {"content": [{**row[0], "top_logprobs": row[:k]} for row in named]}
    else:
        logprobs = {"top_logprobs": [{f"token_id:{i}": p for i, p in row.items()} for row in rows]}
    return {"prompt_token_ids": [5, 6, 7], "token_ids": answer.tolist(), "logprobs": logprobs}


@pytest.mark.parametrize("chat", [False, True])
def test_feedback_has_the_targets_distribution(chat):
    logits = 3 * torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    answer = logits.argmax(-1)
    feedback = to_feedback([values_of(logits, answer, 8, chat)], False, 8, 64, torch.float32)
    top, ids = logits.log_softmax(-1).topk(8)
    assert feedback.prompt_length == 3
    assert feedback.answer.tolist() == answer.tolist()
    assert not feedback.sampled
    torch.testing.assert_close(feedback.top_logps, top)
    assert torch.equal(feedback.top_ids, ids.int())
    torch.testing.assert_close(
        feedback.tail_logp, (1 - top.double().exp().sum(-1)).log().float(), atol=1e-4, rtol=1e-4
    )


def test_a_sampled_token_that_is_not_among_the_likeliest_is_no_loss():
    logits = 3 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    answer = logits.argmin(-1)
    feedback = to_feedback([values_of(logits, answer, 8, chat=False)], True, 8, 64, torch.float32)
    assert torch.equal(feedback.top_ids, logits.topk(8).indices.int())
    assert feedback.sampled


def test_a_distribution_that_is_all_in_its_top_has_a_floor_for_a_tail():
    logits = torch.full((1, 64), -50.0)
    logits[0, 3] = 50.0
    feedback = to_feedback([values_of(logits, torch.tensor([3]), 8, chat=False)], False, 8, 64)
    assert float(feedback.tail_logp[0]) == -16.0


@pytest.mark.parametrize(
    "broken",
    [
        {"token_ids": None},
        {"prompt_token_ids": None},
        {"logprobs": None},
        {"token_ids": [1, 2]},
        {"token_ids": [999] * 6},
        {"prompt_token_ids": [-1]},
        {"logprobs": {"top_logprobs": [{"word": -0.1}] * 6}},
        {"logprobs": []},
        {"logprobs": {"top_logprobs": [{"token_id:1": None}] * 6}},
    ],
)
def test_an_answer_that_cannot_be_read_teaches_nothing(broken):
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    values = {**values_of(logits, logits.argmax(-1), 8, chat=False), **broken}
    values = {name: value for name, value in values.items() if value is not None}
    assert to_feedback([values], False, 8, 64) is None


def test_a_position_with_too_few_log_probs_is_text_alone():
    logits = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    values = values_of(logits, logits.argmax(-1), 8, chat=False)
    rows = values["logprobs"]["top_logprobs"]
    rows[1] = dict(list(rows[1].items())[:3])
    feedback = to_feedback([values], False, 8, 64)
    assert feedback.teaching_mask("all").tolist() == [True, False]
    assert math.isnan(feedback.tail_logp[1])
