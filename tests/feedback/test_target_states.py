"""`TargetStates`: what is held is near what the target had, and each state stays with its position, in memory, in a file and in a window."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd import FeedbackBuffer
from hf_osd.distill.windows import cut
from hf_osd.feedback.target_states import TargetStates
from hf_osd.feedback.trace import pack, read_trace, unpack, write_trace


def states_of(count: int, start: int = 0, n_aux: int = 2, hidden: int = 3) -> TargetStates:
    """States that say where they are: the largest number of each is its position + 1."""
    rows = torch.arange(start, start + count)[:, None] + torch.linspace(0.2, 1, n_aux * hidden)
    rows[:, -1] = torch.arange(start, start + count) + 1
    return TargetStates.from_states(rows, n_aux, start)


def places(states: TargetStates) -> list[int]:
    """The positions of `states_of` that these states are of, whatever their places now."""
    return (states.dense()[:, -1] - 1).round().int().tolist()


def check_same(now: TargetStates | None, was: TargetStates | None):
    assert (now is None) == (was is None)
    if was is not None:
        assert now.start == was.start
        assert (now.codes.dtype, now.scales.dtype) == (torch.int8, torch.float16)
        assert torch.equal(now.codes, was.codes)
        assert torch.equal(now.scales, was.scales)


@given(
    seed=st.integers(0, 10**6),
    n_aux=st.integers(1, 4),
    magnitude=st.integers(-15, 22),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_each_part_of_a_row_is_off_by_little(seed, n_aux, magnitude, dtype):
    """One layer's outliers do not cost another layer its precision."""
    random = torch.Generator().manual_seed(seed)
    states = torch.randn(5, n_aux, 16, generator=random) * 2.0**magnitude
    states[:, 0] *= torch.rand(5, 1, generator=random)
    states[0, 0] = 0.0
    states = states.flatten(1).to(dtype)
    kept = TargetStates.from_states(states, n_aux, 3)
    assert (len(kept), kept.start, kept.stop, kept.width, kept.n_aux) == (5, 3, 8, n_aux * 16, n_aux)
    parts = states.float().unflatten(1, (n_aux, 16))
    error = (kept.dense().unflatten(1, (n_aux, 16)) - parts).abs().amax(-1)
    most = parts.abs().amax(-1)
    held = most >= 1e-5
    assert (error <= most / 127 * (1 + 1e-5))[held].all()
    assert (error <= 1e-5)[~held].all()


def test_a_quarter_of_the_memory_is_taken():
    kept = states_of(100, n_aux=3, hidden=64)
    assert kept.nbytes == 100 * (3 * 64 + 3 * 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e7])
def test_states_that_are_not_finite_are_refused(value):
    states = torch.ones(3, 4)
    states[1, 2] = value
    with pytest.raises(ValueError, match="bfloat16"):
        TargetStates.from_states(states, 2, 0)


def test_what_does_not_fit_is_refused():
    for states, n_aux, start in ((torch.ones(3, 5), 2, 0), (torch.ones(3), 1, 0), (torch.ones(3, 4), 2, -1)):
        with pytest.raises(ValueError, match="give"):
            TargetStates.from_states(states, n_aux, start)
    with pytest.raises(ValueError, match="follow one another"):
        TargetStates.cat([states_of(3, 0), states_of(3, 4)])
    with pytest.raises(ValueError, match="at least one"):
        TargetStates.cat([])
    for wrong in ([3, 4], [8, 9]):
        with pytest.raises(IndexError, match="positions 4 to 8"):
            states_of(5, 4).select(torch.tensor(wrong))


def test_parts_keep_their_places():
    whole = states_of(10, 5)
    part = whole.cut(7, 100)
    assert (part.start, places(part)) == (7, list(range(7, 15)))
    assert part.codes.untyped_storage().nbytes() == part.codes.nbytes
    assert whole.cut(0, 5) is whole.cut(15, 20) is whole.cut(9, 9) is None
    check_same(TargetStates.cat([whole.cut(0, 8), whole.cut(8, 9), whole.cut(9, 15)]), whole)
    chosen = whole.select(torch.tensor([5, 14, 9]))
    assert (chosen.start, places(chosen)) == (0, [5, 14, 9])
    assert whole.moved(-2).start == 3


@given(
    have=st.lists(st.none() | st.tuples(st.integers(1, 9), st.integers(0, 4), st.integers(1, 3)), max_size=5),
)
def test_they_come_back_from_a_file_and_a_wire(make_feedback, tmp_path_factory, have):
    written = []
    for i, one in enumerate(have):
        states = None if one is None else states_of(one[0], one[1], n_aux=one[2], hidden=i + 1)
        written.append(replace(make_feedback(seed=i), states=states))
    path = tmp_path_factory.mktemp("states") / "trace"
    write_trace(path, written)
    for read in (read_trace(path)[0], unpack(pack(written))):
        for now, was in zip(read, written, strict=True):
            check_same(now.states, was.states)
            if now.states is not None:
                assert now.states.codes.untyped_storage().nbytes() == now.states.codes.nbytes


def test_a_trace_without_states_is_as_before(make_feedback):
    assert not {name for name in pack([make_feedback()]) if name.startswith("state")}


def test_they_count_in_the_buffer(make_feedback, tmp_path):
    plain = make_feedback(prompt_rows=2)
    request = replace(plain, states=states_of(14, 0, hidden=100))
    assert request.nbytes == plain.nbytes + request.states.nbytes
    buffer = FeedbackBuffer(max_bytes=2 * request.nbytes)
    for _ in range(3):
        buffer.add(replace(request))
    assert len(buffer) == 2
    buffer.save(tmp_path / "buffer")
    restored = FeedbackBuffer()
    restored.restore(tmp_path / "buffer")
    check_same(restored.new()[0].states, request.states)


def test_they_stay_with_a_request_whose_rows_are_cut(make_feedback):
    request = replace(make_feedback(prompt_rows=4), states=states_of(14))
    assert request.truncate(4).states is request.states
    assert request.with_prompt_rows(1).states is request.states


@given(
    prompt=st.integers(1, 200),
    n=st.integers(1, 200),
    most=st.integers(16, 120),
    start=st.integers(0, 150),
    missing=st.integers(0, 20),
)
def test_in_a_window_each_token_has_the_state_before_it(make_feedback, prompt, n, most, start, missing):
    """A draft reads the token at j with the state at j-1; only of the window's first tokens the last one's own state is left out."""
    length = prompt + n
    count = length - 1 - missing - start
    request = make_feedback(prompt=prompt, n=n, k=2)
    request.tokens.copy_(torch.arange(length, dtype=torch.int32))  # each says where it is
    request = replace(request, states=states_of(count, start) if count > 0 else None)
    part, _ = cut(request, most)
    at = part.tokens.tolist()
    there = set(range(start, start + count))
    expected = {j: at[j] - 1 for j in range(1, len(at)) if at[j] - 1 in there}
    if part.states is None:
        assert not expected
        return
    found = {part.states.start + i + 1: place for i, place in enumerate(places(part.states))}
    assert {j: place for j, place in found.items() if j < len(at)} == expected
