"""Traces: every field comes back as it was, and a file that is no trace is told from one."""

import dataclasses
import functools
import os
import stat
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.feedback.trace import read_trace, write_trace

LOGPS = ("top_logps", "tail_logp", "draft_logps", "drafted_logp")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all examples of a test, whose files replace each other."""
    return tmp_path_factory.mktemp("traces")


def answered(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Feedback:
    """A request that the target answered alone: nothing was drafted."""
    logits = torch.randn(n, 64, generator=torch.Generator().manual_seed(seed))
    return Feedback.from_target(torch.arange(n + 3), 3, SparseLogits.from_logits(logits, k, dtype))


def without_target(feedback: Feedback, at: list[int]) -> Feedback:
    """The same request without a target at some positions."""
    names = ("top_logps", "tail_logp")
    return dataclasses.replace(
        feedback,
        **{
            name: getattr(feedback, name).index_fill(0, torch.tensor(at, dtype=torch.long), torch.nan)
            for name in names
        },
    )


def stored(path) -> tuple[dict, dict]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)


def check_same(read: list[Feedback], written: list[Feedback]):
    assert len(read) == len(written)
    for now, was in zip(read, written, strict=True):
        for f in dataclasses.fields(Feedback):
            value, expected = getattr(now, f.name), getattr(was, f.name)
            if isinstance(expected, torch.Tensor):
                assert value.dtype == expected.dtype, f.name
                torch.testing.assert_close(value, expected, atol=0, rtol=0, equal_nan=True, msg=f.name)
            elif isinstance(expected, SparseLogits):
                for name, rows in vars(expected).items():
                    assert getattr(value, name).dtype == rows.dtype, name
                    assert torch.equal(getattr(value, name), rows), name
            elif f.name == "created":
                assert value == pytest.approx(expected, abs=5.0)  # the clock ran on, and a machine may be busy
            else:
                assert type(value) is type(expected), f.name
                assert value == expected, f.name


REQUEST = st.fixed_dictionaries(
    {
        "n": st.integers(0, 9),
        "prompt": st.integers(0, 7),
        "k": st.integers(1, 20),
        "seed": st.integers(0, 10**6),
        "sampled": st.booleans(),
        "prompt_rows": st.integers(0, 5),
    }
)


@given(
    requests=st.lists(REQUEST, max_size=6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    drafted=st.booleans(),
    sources=st.lists(st.none() | st.integers(0, 5), min_size=6, max_size=6),
    holes=st.booleans(),
)
def test_every_field_comes_back_in_order(make_feedback, folder, requests, dtype, drafted, sources, holes):
    written = []
    for request, source in zip(requests, sources, strict=False):
        feedback = make_feedback(dtype=dtype, **request)
        if not drafted:
            rows, of_prompt = feedback.rows, feedback.prompt_rows
            feedback = Feedback.from_target(feedback.tokens, feedback.prompt_length, rows, prompt_rows=of_prompt)
        if source is not None:
            feedback = dataclasses.replace(feedback, source=torch.arange(source, dtype=torch.int32))
        if holes and len(feedback):
            feedback = without_target(feedback, [0])
        written.append(feedback)
    write_trace(folder / "trace", written)
    check_same(read_trace(folder / "trace")[0], written)


@given(dtypes=st.lists(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]), min_size=1, max_size=5))
@pytest.mark.parametrize("drafted", [True, False])
def test_requests_may_differ_in_dtype(make_feedback, folder, dtypes, drafted):
    """To put them together is to promote them; a buffer that was restored under another `feedback_dtype` holds both."""
    make = functools.partial(make_feedback, prompt_rows=2) if drafted else answered
    written = [make(n=3, k=4, seed=i, dtype=dtype) for i, dtype in enumerate(dtypes)]
    write_trace(folder / "trace", written)
    read, _ = read_trace(folder / "trace")
    check_same(read, written)
    assert [{getattr(one, name).dtype for name in LOGPS} for one in read] == [{dtype} for dtype in dtypes]
    assert ("dtypes" in stored(folder / "trace")[0]) == (len(set(dtypes)) > 1)


def test_a_draft_that_said_nothing_takes_no_room(make_feedback, tmp_path):
    write_trace(tmp_path / "trace", [answered(5, 8), answered(2, 3)])
    assert stored(tmp_path / "trace")[0]["draft_logps"].numel() == 0
    for one, shape in zip(read_trace(tmp_path / "trace")[0], [(5, 8), (2, 3)], strict=True):
        assert one.draft_logps.shape == shape
        assert one.draft_logps.dtype == torch.float16
        assert one.draft_logps.isnan().all()
    mixed = [answered(5, 8), make_feedback(n=4)]
    write_trace(tmp_path / "trace", mixed)
    check_same(read_trace(tmp_path / "trace")[0], mixed)


def test_no_requests_are_a_trace_too(tmp_path):
    write_trace(tmp_path / "trace", [], {"new": "0"})
    assert read_trace(tmp_path / "trace") == ([], {"new": "0"})


def test_requests_are_as_old_as_they_were(make_feedback, tmp_path, monkeypatch):
    written = [make_feedback(created=990.0), make_feedback(created=999.5)]
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    write_trace(tmp_path / "trace", written)
    monkeypatch.setattr(time, "monotonic", lambda: 20.0)  # another process, another clock
    assert [one.created for one in read_trace(tmp_path / "trace")[0]] == [10.0, 19.5]


@given(facts=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.text(st.characters(codec="utf-8"))))
def test_facts_come_back(folder, facts):
    facts.pop("format", None)
    given = dict(facts)
    write_trace(folder / "trace", [answered(2, 4)], facts)
    assert read_trace(folder / "trace")[1] == facts == given


def test_without_facts_there_are_none(tmp_path):
    write_trace(tmp_path / "trace", [answered(2, 4)])
    assert read_trace(tmp_path / "trace")[1] == {}


def test_each_request_owns_its_memory(make_feedback, tmp_path):
    """As views of the file's tensors, a few requests of a trace would hold the memory of all of them."""
    written = [make_feedback(n=4, seed=i, prompt_rows=2) for i in range(3)]
    write_trace(
        tmp_path / "trace",
        [dataclasses.replace(one, source=torch.arange(4, dtype=torch.int32)) for one in written],
    )
    for one in read_trace(tmp_path / "trace")[0]:
        for name, tensor in [*one.tensors().items(), *vars(one.prompt_rows).items()]:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("existed", [False, True])
def test_only_its_owner_may_read_it(tmp_path, existed):
    path, mask = tmp_path / "trace", os.umask(0)
    try:
        if existed:
            path.write_bytes(b"older")
            path.chmod(0o644)
        write_trace(path, [answered(2, 4)])
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("fails", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_trace_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, fails, error):
    path, written = tmp_path / "trace", [answered(2, 4)]
    write_trace(path, written)
    before = path.read_bytes()

    def failing(*args):
        raise error("planted")

    with monkeypatch.context() as patch:
        patch.setattr(os, fails, failing)
        with pytest.raises(error, match="planted"):
            write_trace(path, [answered(9, 4)])
        with pytest.raises(error, match="planted"):
            write_trace(tmp_path / "other", written)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_relative_path_is_one_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_trace("trace", [answered(2, 4)])
    assert len(read_trace("trace")[0]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_trace(tmp_path / "nowhere" / "trace", [])


def test_a_missing_trace_is_told_from_a_damaged_one(tmp_path):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"No trace at {path}"):
            read_trace(path)


def empty(path):
    path.write_bytes(b"")


def other_bytes(path):
    path.write_bytes(b"not a trace, and longer than a header's length")


def weights_of_a_model(path):
    save_file({"weight": torch.zeros(3)}, path)


def of_another_version(path):
    tensors, metadata = stored(path)
    save_file(tensors, path, metadata={**metadata, "format": "hf_osd.feedback.trace.99"})


def lacks_a_tensor(path):
    tensors, metadata = stored(path)
    del tensors["overlap"]
    save_file(tensors, path, metadata=metadata)


def lacks_a_request(path):
    tensors, metadata = stored(path)
    save_file({**tensors, "facts": tensors["facts"][:1].clone()}, path, metadata=metadata)


def impossible_facts(value, path):
    tensors, metadata = stored(path)
    tensors["facts"][0, 0] = value
    save_file(tensors, path, metadata=metadata)


DAMAGES = [empty, other_bytes, weights_of_a_model, of_another_version, lacks_a_tensor, lacks_a_request]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_is_no_trace_is_named(tmp_path, damage):
    path = tmp_path / "trace"
    write_trace(path, [answered(2, 4), answered(3, 4)])
    damage(path)
    with pytest.raises(ValueError, match=f"{path} is no trace that hf_osd can read .*record it again"):
        read_trace(path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0, 0.0, 1e12])
@pytest.mark.parametrize("drafted", [True, False])
def test_impossible_lengths_are_damage(make_feedback, tmp_path, value, drafted):
    """Not an attempt to make room for them."""
    path = tmp_path / "trace"
    write_trace(path, [make_feedback(n=4) if drafted else answered(4, 4)])
    impossible_facts(value, path)
    with pytest.raises(ValueError, match=f"{path} is no trace"):
        read_trace(path)


@given(share=st.floats(0.0, 1.0, exclude_max=True))
def test_a_truncated_trace_is_damaged(folder, share):
    path = folder / "truncated"
    write_trace(path, [answered(4, 8)])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"{path} is no trace"):
        read_trace(path)
