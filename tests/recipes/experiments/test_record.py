"""Recording on a tiny model: the files, their contents, and that a recording goes on where it stopped."""

import json
import stat

import pytest
import torch

from hf_osd import record_answers
from hf_osd.feedback.trace import read_trace
from recipes.common.models import encode, load_target
from recipes.common.run_folder import LOCK, locked
from recipes.experiments import record

STREAMS = {"one": 14, "two": 7}
FILES = {
    *("one/held_back-00000", "one/stream-00000", "one/stream-00004", "one/stream-00008"),
    *("two/held_back-00000", "two/stream-00000"),
}


@pytest.fixture
def run(target_dir, words, tmp_path, monkeypatch):
    """`run(*flags) -> exit status`: 3 prompts held back of each of two streams and the others, in shards of 4, into tmp_path/out.

    `run.recorded` is how many prompts each call of `record_answers` had.
    """
    for domain, count in STREAMS.items():
        rows = [{"prompt": " ".join(words[(i * 7 + j) % 62] for j in range(5 + i % 3))} for i in range(count)]
        (tmp_path / f"{domain}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recording(target, prompts, *args, **kwargs):
        call.recorded.append(len(prompts))
        return record_answers(target, prompts, *args, **kwargs)

    def call(*flags):
        call.recorded = []
        settings = ["--target", target_dir, "--stream", f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"]
        settings += ["--requests", "100", "--held_back", "3", "--max_new_tokens", "8", "--batch_answers", "3"]
        settings += ["--threads", "1", "--output_dir", tmp_path / "out"]
        return record.main([str(flag) for flag in (*settings, *flags)])

    monkeypatch.setattr(record, "SHARD", 4)
    monkeypatch.setattr(record, "record_answers", recording)
    call.out = tmp_path / "out"
    return call


def files(folder):
    """The traces in `folder`, and when each was written."""
    return {
        str(path.relative_to(folder).with_suffix("")): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.suffix == ".safetensors"
    }


def trace(folder, domain, part):
    """A domain's requests of one part, in the order of the shards, and the ids of their rows."""
    requests, ids = [], []
    for path in sorted((folder / domain).glob(f"{part}-*.safetensors")):
        read, facts = read_trace(path)
        requests += read
        ids += json.loads(facts["ids"])
    return requests, ids


def test_each_domain_has_its_prompts_in_shards_once(run, target_dir, tmp_path):
    assert run() == 0
    assert set(files(run.out)) == FILES
    _, tokenizer = load_target(str(target_dir), "auto")
    for domain, count in STREAMS.items():
        rows = [json.loads(line) for line in (tmp_path / f"{domain}.jsonl").read_text().splitlines()]
        prompts = {str(i + 1): encode(tokenizer, row["prompt"]).tolist() for i, row in enumerate(rows)}
        (held_back, held_ids), (stream, ids) = (trace(run.out, domain, part) for part in ("held_back", "stream"))
        assert (len(held_back), len(stream)) == (3, count - 3)
        assert {*held_ids} | {*ids} == {*prompts}
        assert not {*held_ids} & {*ids}
        for one, row in zip(held_back + stream, held_ids + ids, strict=True):
            assert one.tokens[: one.prompt_length].tolist() == prompts[row]
        assert ids != sorted(ids, key=int), "the stream is in random order"


def test_no_file_has_more_than_was_asked_for(run):
    assert run("--requests", "6") == 0
    assert [len(trace(run.out, domain, "stream")[0]) for domain in STREAMS] == [6, 4]


def test_a_recording_is_what_record_answers_returns(run, target_dir):
    assert run("--top_k", "8", "--feedback_dtype", "float32") == 0
    target, _ = load_target(str(target_dir), "auto")
    for part in ("held_back", "stream"):
        recorded, _ = trace(run.out, "one", part)
        prompts = [one.tokens[: one.prompt_length].long() for one in recorded]
        for one, expected in zip(recorded, record_answers(target, prompts, 8, 1, 8, torch.float32), strict=True):
            assert one.tokens.tolist() == expected.tokens.tolist()
            assert one.top_ids.tolist() == expected.top_ids.tolist()
            for name in ("top_logps", "tail_logp"):  # float32, padded or not
                torch.testing.assert_close(getattr(one, name), getattr(expected, name), atol=1e-4, rtol=0)
            assert one.draft_logps.isnan().all()


def test_another_answer_to_each_request_is_recorded_where_asked_for(run, target_dir):
    assert run() == 0
    before = files(run.out)
    assert run("--again", "1.5") == 0
    assert run.recorded == [4, 4, 3, 4], "what was recorded without them stays"
    assert {name: files(run.out)[name] for name in FILES} == before
    again1, again2 = (
        {name.replace("stream", part) for name in FILES if "stream" in name} for part in ("again1", "again2")
    )
    assert set(files(run.out)) == FILES | again1
    requests, ids = trace(run.out, "one", "stream")
    again, of = trace(run.out, "one", "again1")
    assert of == ids
    assert all(one.sampled and not other.sampled for one, other in zip(again, requests, strict=True))
    prompts = [[one.tokens[: one.prompt_length].tolist() for one in part] for part in (again, requests)]
    assert prompts[0] == prompts[1]
    assert any(one.answer.tolist() != other.answer.tolist() for one, other in zip(again, requests, strict=True))

    (run.out / "one" / "again1-00004.safetensors").unlink()
    assert run("--again", "1.5", "--times", "2") == 0
    assert set(files(run.out)) == FILES | again1 | again2
    first, second = ([one.tokens.tolist() for one in trace(run.out, "one", part)[0]] for part in ("again1", "again2"))
    assert first == [one.tokens.tolist() for one in again], "wherever it goes on"
    assert sum(one != other for one, other in zip(first, second, strict=True)) > len(first) // 2


def test_sampled_answers_are_recorded_in_place_of_greedy_ones_where_asked_for(run, refused):
    sampled = ["--temperature", "1.5", "--prompt_positions", "4", "--top_k", "8"]
    assert run(*sampled) == 0
    assert set(files(run.out)) == FILES
    (held_back, _), (stream, _) = (trace(run.out, "one", part) for part in ("held_back", "stream"))
    assert all(request.sampled for request in [*held_back, *stream])
    assert {(request.top_ids.shape[1], len(request.prompt_rows)) for request in stream} == {(8, 4)}
    # α of sampled answers is of what is kept of these: of a small target all.
    assert {(request.top_ids.shape[1], request.prompt_rows) for request in held_back} == {(64, None)}
    first = files(run.out)
    refused(run, *sampled[2:], says="another temperature")
    refused(run, *sampled, "--held_back_top_k", "9", says="another top_k")
    assert run(*sampled, "--overwrite", "true") == 0
    assert files(run.out).keys() == first.keys()


def test_a_trace_has_its_facts_and_only_its_owner_can_read_it(run, target_dir):
    assert run() == 0
    for path in run.out.rglob("*.safetensors"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        _, facts = read_trace(path)
        assert (facts["target"], facts["max_new_tokens"], facts["dtype"]) == (str(target_dir), "8", "float32")
        assert float(facts["seconds"]) >= 0


def test_what_was_recorded_is_not_recorded_again(run):
    assert run() == 0
    assert run.recorded == [3, 4, 4, 3, 3, 4]
    before = files(run.out)
    assert run() == 0
    assert run.recorded == []
    assert files(run.out) == before


def test_only_a_shard_that_is_missing_is_made_anew(run):
    assert run() == 0
    before, path = files(run.out), run.out / "one" / "stream-00008.safetensors"
    was = read_trace(path)[0]
    path.unlink()
    assert run() == 0
    assert run.recorded == [3]
    after = files(run.out)
    assert {name for name in FILES if after[name] != before[name]} == {"one/stream-00008"}
    assert [one.tokens.tolist() for one in read_trace(path)[0]] == [one.tokens.tolist() for one in was]


def test_an_interrupted_recording_goes_on(run, monkeypatch):
    recording, seen = record.record_answers, []

    def interrupted(*args, **kwargs):
        seen.append(None)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return recording(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(record, "record_answers", interrupted)
        assert run() == 130
    assert set(files(run.out)) == {"one/held_back-00000", "one/stream-00000"}
    assert run() == 0
    assert run.recorded == [4, 3, 3, 4]
    assert set(files(run.out)) == FILES


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_new_tokens", "9"], "max_new_tokens"),
        (["--held_back", "2"], "ids"),
        (["--seed", "1"], "ids"),
        (["--dtype", "bfloat16"], "dtype"),
        (["--again", "0.5"], "temperature"),
    ],
)
def test_a_recording_of_something_else_is_neither_mixed_in_nor_lost(run, refused, flags, message):
    assert run("--again", "0.7") == 0
    before = files(run.out)
    refused(run, *flags, says=f"was recorded with another {message}")
    assert run.recorded == []
    assert files(run.out) == before


def test_a_damaged_shard_is_named(run, refused):
    assert run() == 0
    path = run.out / "one" / "stream-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    refused(run, says=str(path))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--requests", "0"], "requests"),
        (["--held_back", "0"], "held_back"),
        (["--again", "-1"], "again"),
        (["--held_back", "14"], "14 prompts"),
        (["--dtype", "int8"], "int8"),
        (["--stream", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_named_before_any_work(run, refused, flags, message):
    refused(run, *flags, says=message)
    assert run.recorded == []
    assert not run.out.exists()


def test_prompts_that_are_too_long_are_left_out(run):
    assert run("--longest_prompt", "6") == 0
    for domain in STREAMS:
        for part in ("held_back", "stream"):
            assert {request.prompt_length for request in trace(run.out, domain, part)[0]} <= {5, 6}
    assert sum(run.recorded) < sum(STREAMS.values())


# Whose folder it is.


def test_prompts_of_the_same_numbers_and_another_text_are_another_recording(run, refused, tmp_path):
    assert run() == 0
    before, path = files(run.out), tmp_path / "two.jsonl"
    path.write_text(path.read_text().replace("w0 ", "w1 "))
    refused(run, says="another prompts")
    assert files(run.out) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_k", "8"], "top_k"),
        (["--feedback_dtype", "float32"], "feedback_dtype"),
        (["--prompt_positions", "3"], "prompt_positions"),
    ],
)
def test_a_recording_of_other_rows_or_another_target_is_noticed(run, refused, flags, message):
    assert run() == 0
    refused(run, *flags, says=f"another {message}")


def test_all_that_is_there_is_looked_at_before_anything_is_recorded(run, refused, tmp_path):
    assert run("--stream", tmp_path / "two.jsonl") == 0
    refused(run, "--max_new_tokens", "9", says="another max_new_tokens")  # the second of the two streams
    assert run.recorded == []
    assert not list((run.out / "one").glob("*.safetensors"))


def test_a_recording_is_made_anew_when_asked(run):
    assert run() == 0
    (run.out / "one" / "mine.safetensors").write_text("mine")
    assert run("--max_new_tokens", "9", "--requests", "4", "--overwrite") == 0
    assert set(files(run.out)) == {
        *("one/held_back-00000", "one/stream-00000", "one/mine"),
        *("two/held_back-00000", "two/stream-00000"),
    }
    assert read_trace(run.out / "one" / "stream-00000.safetensors")[1]["max_new_tokens"] == "9"


def test_a_second_recording_of_a_domain_is_kept_out_and_one_of_another_is_not(run, refused, tmp_path):
    (run.out / "one").mkdir(parents=True)
    with locked(run.out / "one" / LOCK, "it"):
        refused(run, says="in use by another process")
        assert run.recorded == []
        assert run("--stream", tmp_path / "two.jsonl") == 0


def test_a_domain_of_any_name_is_a_folder_within(run, words, tmp_path):
    names = ["../../up", "/abs", "..", "a/b", "$x$"]
    rows = [
        {"prompt": f"w{k} w{i} w{i + 1} w{i + 2} w{i + 3}", "domain": name}
        for k, name in enumerate(names)
        for i in range(4)
    ]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = set(tmp_path.iterdir())
    assert run("--stream", tmp_path / "named.jsonl", "--held_back", "1") == 0
    assert set(tmp_path.iterdir()) == before | {run.out}
    assert len(list(run.out.iterdir())) == len(names)
    assert (run.out / "$x$" / "stream-00000.safetensors").is_file()


def test_no_domain_is_recorded_over_the_target(run, refused, target_dir, tmp_path):
    (tmp_path / "out").symlink_to(target_dir.parent)
    (tmp_path / f"{target_dir.name}.jsonl").write_text((tmp_path / "one.jsonl").read_text())
    refused(run, "--stream", tmp_path / f"{target_dir.name}.jsonl", says="is --target")
    assert not list(target_dir.glob("stream-*"))
