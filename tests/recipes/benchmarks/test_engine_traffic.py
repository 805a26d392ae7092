"""What a token takes between engine, sidecar and learner: the streams are such as a sidecar reads, and the bytes are those that it cuts out."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_osd import record_answers
from hf_osd.engines.sidecar.answers import to_feedback
from hf_osd.engines.sidecar.asking import CHAT, COMPLETIONS, StreamCutter, ask
from recipes.benchmarks import engine_traffic


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_its_streams_are_read_as_an_engines_are(target_dir, path):
    target, tokenizer = AutoModelForCausalLM.from_pretrained(target_dir), AutoTokenizer.from_pretrained(target_dir)
    (answer,) = record_answers(target, [torch.tensor([5, 6, 7])], 6, top_k=4, dtype=torch.float32)
    asked = ask(path, json.dumps({"prompt": [1], "messages": [], "stream": True}).encode(), 4)
    cutter = StreamCutter(asked)
    seen = b"".join(cutter.feed(event) for event in engine_traffic.events(answer, tokenizer, path))
    assert cutter.finished
    found = to_feedback(cutter.values, False, 4, 64, torch.float32)
    assert torch.equal(found.tokens, answer.tokens)
    assert torch.equal(found.top_ids, answer.top_ids)
    torch.testing.assert_close(found.top_logps, answer.top_logps)
    assert b"token_id:" not in seen
    assert seen.count(b'"finish_reason":"length"') == 1


def test_bytes_and_times_are_there(target_dir, tmp_path, capsys):
    rows = [{"prompt": f"w{i} w{i + 1} w{i + 2}"} for i in range(3)]
    stream, file = tmp_path / "s.jsonl", tmp_path / "figures.json"
    stream.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--target", target_dir, "--stream", stream, "--dtype", "float32", "--threads", 1, "--requests", 2]
    flags += ["--max_new_tokens", 5, "--prompt_tokens", 2, "--top_log_probs", 4, "--repeats", 1, "--json", file]
    assert engine_traffic.main([str(flag) for flag in flags]) == 0
    figures = json.loads(file.read_text())
    assert (figures["requests"], figures["prompt_tokens"]) == (2, 4)
    assert 2 <= figures["tokens"] <= 10
    completions, chats = (figures["streams"][path]["bytes_a_token"] for path in (COMPLETIONS, CHAT))
    assert 4 * len('"token_id:5":-1.123456,') < completions < chats < 1500
    assert figures["learner"]["bytes_a_token"] > 4 * (4 + 2)
    out = capsys.readouterr().out
    assert f"from the engine, chats      {chats:>5.0f}" in out
    assert "Gbit/s of 1000 engines" in out
