"""Prompts and answers for a draft that is to be chosen."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from hf_osd import OnlineConfig
from hf_osd.shapes.answers import Prompt, answers_within, encoded, free_prompts, read_prompts

CONFIG = OnlineConfig(seed=0, prompt_positions=0)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0")


def test_prompts_are_read_and_a_line_without_one_is_named(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "domain": "x"}\n{"prompt": "a"}\n')
    assert sorted(one.text for one in read_prompts(path)) == ["a", "b"]
    assert sum(one.is_held_back for one in read_prompts(path)) == 1
    for line in ('{"text": "a"}', "a", "3", '["prompt"]', '{"prompt": " "}'):
        path.write_text('{"prompt": "a"}\n' + line)
        with pytest.raises(ValueError, match="line 2"):
            read_prompts(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(path)
    path.write_text('{"prompt": "a", "group": "g"}\n{"prompt": "b", "group": "g"}\n')
    with pytest.raises(ValueError, match="one group"):
        read_prompts(path)


def test_a_group_is_on_one_side_and_what_is_held_back_is_spread(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{group} {i}", "group": group} for group in "abcdefghij" for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(path)
    held = {one.group for one in prompts if one.is_held_back}
    assert len(held) == 2
    assert not held & {one.group for one in prompts if not one.is_held_back}
    assert len(prompts) == 60
    assert all(any(one.is_held_back for one in prompts[i : i + 5]) for i in range(0, 55, 5))
    assert read_prompts(path) == prompts != read_prompts(path, seed=1)


def test_prompts_without_room_for_an_answer_are_left_out(target, tokenizer):
    long, held = Prompt(" ".join(["w5"] * 505)), Prompt("w7", is_held_back=True)
    found, aside = encoded([Prompt("w5 w6"), long, held], tokenizer, target, 16)
    assert ([ids.tolist() for ids in found], aside) == ([[5, 6], [7]], [False, True])
    with pytest.raises(ValueError, match="shorter ones"):
        encoded([long, held], tokenizer, target, 16)


def test_a_chat_template_is_applied(target, tokenizer):
    tokenizer.chat_template = "w7 {{ messages[0]['content'] }} w8"
    try:
        found, _ = encoded([Prompt("w5"), Prompt("w6", is_held_back=True)], tokenizer, target, 16)
        assert [ids.tolist() for ids in found] == [[7, 5, 8], [7, 6, 8]]
    finally:
        tokenizer.chat_template = None


def test_free_texts_differ_repeat_with_the_seed_and_leave_no_trace(target, tokenizer):
    state = torch.random.get_rng_state()
    texts, again = (
        answers_within(target, free_prompts(target, tokenizer), 12, CONFIG, seconds=0.0, sampled=True)
        for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(texts) == 16
    assert all(one.sampled and one.prompt_length == 1 and one.tokens[0] == 0 for one in texts)
    assert len({tuple(one.tokens.tolist()) for one in texts}) > 8
    assert all(torch.equal(one.tokens, other.tokens) for one, other in zip(texts, again, strict=True))


def test_answers_end_with_the_prompts_or_the_time(target):
    prompts = [torch.tensor([2, 3, i]) for i in range(2, 42)]
    assert len(answers_within(target, prompts, 4, CONFIG, seconds=1e9)) == 40
    ticks = itertools.count()
    timed = answers_within(target, prompts, 4, CONFIG, seconds=2.0, clock=lambda: float(next(ticks)))
    assert len(timed) == 24
    states = answers_within(target, prompts[:3], 4, CONFIG, seconds=0.0, states_of=[1, 2])
    assert [one.states is not None for one in states] == [True] * 3
