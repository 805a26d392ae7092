"""Frames between two processes: what is written is what is read, and whatever else comes is refused or is the end."""

import contextlib
import io
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.remote.frames import FrameWriter, from_bytes, read_frame, to_bytes

from ..served import in_threads

TENSORS = {
    "floats": torch.randn(3, 2),
    "halves": torch.randn(4).bfloat16(),
    "ids": torch.arange(5, dtype=torch.int32),
    "none": torch.zeros(0, 7),
    "one": torch.tensor(2.5),
    "turned": torch.randn(2, 3).T,
}
VALUES = {"updates": 3, "estimate": None, "name": "α", "nested": {"low": -0.5, "all": [1, 2]}}


def written(*frames) -> bytes:
    stream = io.BytesIO()
    writer = FrameWriter(stream)
    for frame in frames:
        writer.write(*frame)
    return stream.getvalue()


def test_frames_come_back_as_they_were_written_and_in_order():
    stream = io.BytesIO(written(("weights", TENSORS, VALUES), ("figures",), ("answer", {}, {"refreshed": True})))
    kind, tensors, values = read_frame(stream)
    assert (kind, values) == ("weights", VALUES)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert read_frame(stream) == ("figures", {}, {})
    assert read_frame(stream) == ("answer", {}, {"refreshed": True})
    assert read_frame(stream) is None


def test_a_frame_that_breaks_off_anywhere_is_the_end():
    data = written(("answer", {"ids": TENSORS["ids"]}, VALUES))
    for cut in range(len(data)):
        assert read_frame(io.BytesIO(data[:cut])) is None


def test_what_somebody_printed_is_no_frame():
    """Read as a length it would be 10¹⁸ bytes."""
    for printed in (b"Traceback (most recent call last):\n", b"x", b"\0" * 64, pickle.dumps(print)):
        with pytest.raises(ValueError, match="no frame of hf_osd"):
            read_frame(io.BytesIO(printed))


def test_nor_is_a_frame_of_something_else():
    for data in (
        b"",
        b"\0" * 8,
        pickle.dumps(print),
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x02\0\0\0\0\0\0\0[]",
        to_bytes("a")[:-3],
    ):
        with pytest.raises(ValueError, match="both ends must be of one version"):
            from_bytes(data)


@given(at=st.integers(0, 10**4), value=st.integers(0, 255))
def test_a_damaged_frame_is_refused_or_read_and_never_breaks_the_reader(at, value):
    data = bytearray(to_bytes("answer", {"ids": TENSORS["ids"]}, VALUES))
    data[at % len(data)] = value
    with contextlib.suppress(ValueError):
        assert len(from_bytes(bytes(data))) == 3


def test_frames_of_several_threads_do_not_mix():
    stream = io.BytesIO()
    writer = FrameWriter(stream)

    def write(number):
        for _ in range(50):
            writer.write("number", {"n": torch.full((100,), number)}, {"n": number})

    assert in_threads(*(partial(write, number) for number in range(4)), within=60) == []
    stream.seek(0)
    seen = []
    while (frame := read_frame(stream)) is not None:
        _, tensors, values = frame
        assert (tensors["n"] == values["n"]).all()
        seen.append(values["n"])
    assert sorted(seen) == sorted(list(range(4)) * 50)
