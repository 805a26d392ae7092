"""`compare_outputs`: a near-tie is told from a bug, at the first token where two outputs differ."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.metrics.parity import compare_outputs, is_near_tie


class Said:
    """A target whose last logits are those given, whatever it reads; it keeps what it read."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.logits = logits
        self.read = []

    def __call__(self, input_ids, use_cache):
        self.read.append(input_ids[0].tolist())
        logits = torch.zeros(1, input_ids.shape[1], len(self.logits), dtype=self.logits.dtype)
        logits[0, -1] = self.logits
        return type("Output", (), {"logits": logits})()


def compare(logits, plain, assisted):
    target = Said(logits)
    return compare_outputs(target, torch.tensor(plain), torch.tensor(assisted)), target.read


def test_equal_outputs_are_identical_and_cost_no_forward():
    assert compare(torch.zeros(9), [1, 2, 3], [1, 2, 3]) == ("identical", [])


def test_an_output_cut_short_is_a_mismatch():
    """A block cut wrongly at EOS or at the length limit: all tokens there are agree."""
    assert compare(torch.zeros(9), [1, 2, 3], [1, 2])[0] == "mismatch"
    assert compare(torch.zeros(9), [1, 2], [1, 2, 3])[0] == "mismatch"


def test_after_a_near_tie_the_outputs_may_part():
    logits = torch.zeros(9)
    logits[4], logits[5] = 7.0, 7.0005
    verdict, read = compare(logits, [1, 2, 4, 8, 8], [1, 2, 5, 3])
    assert verdict == "near_tie"
    assert read == [[1, 2]], "judged by one forward over the common prefix"


def test_any_other_difference_is_a_mismatch():
    logits = torch.zeros(9)
    logits[4], logits[5] = 7.0, 7.01
    assert compare(logits, [1, 2, 4], [1, 2, 5])[0] == "mismatch"


def test_only_the_first_difference_is_judged():
    """Logits of the later difference, 7 and 8, are a tie; those of the first, 4 and 5, are not."""
    logits = torch.tensor([0.0, 0, 0, 0, 9.0, 1.0, 0, 3.0, 3.0])
    assert compare(logits, [1, 4, 7], [1, 5, 8])[0] == "mismatch"


def test_outputs_may_come_with_a_batch_dimension():
    assert compare(torch.zeros(9), [[1, 2, 3]], [[1, 2, 3]])[0] == "identical"


def test_a_real_model_is_asked_about_the_token_after_the_prefix(tiny_llama):
    """Off by one, it would judge the logits of another position."""
    model, prefix = tiny_llama(), torch.arange(5, 12)
    with torch.no_grad():
        logits = model(input_ids=prefix[None]).logits[0, -1]
    first, second = logits.topk(2).indices
    assert logits[first] - logits[second] > 0.01
    outputs = [torch.cat([prefix, token[None]]) for token in (first, second)]
    assert compare_outputs(model, *outputs) == "mismatch"
    with torch.no_grad():
        model.lm_head.weight[second] = model.lm_head.weight[first]
    assert compare_outputs(model, *outputs) == "near_tie"


@pytest.mark.parametrize("size", [0.0, 1.0, 100.0])
def test_float32_ties_are_within_a_thousandth_whatever_the_size(size):
    a = torch.tensor(size, dtype=torch.float32)
    assert is_near_tie(a, a + 0.0009)
    assert is_near_tie(a + 0.0009, a)
    assert not is_near_tie(a, a + 0.0011)
    assert not is_near_tie(a + 0.0011, a)


@given(
    exponent=st.integers(-10, 13),
    mantissa=st.integers(0, 121),
    steps=st.integers(0, 6),
    negative=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_half_precision_ties_are_within_two_units_in_the_last_place(exponent, mantissa, steps, negative, dtype):
    unit = torch.finfo(dtype).eps
    values = [(1 + m * unit) * 2.0**exponent * (-1) ** negative for m in (mantissa, mantissa + steps)]
    a, b = torch.tensor(values, dtype=dtype)
    assert is_near_tie(a, b) == is_near_tie(b, a) == (steps <= 2)


def test_the_unit_is_that_of_the_larger_logit():
    """Just below a power of two, units are half as large as above it."""
    two = torch.tensor(2.0, dtype=torch.bfloat16)  # its unit is 2^-6
    assert is_near_tie(two, two - 2 * 2**-6)
    assert not is_near_tie(two, two - 2.5 * 2**-6)


def test_two_zeros_tie_in_half_precision():
    zero = torch.zeros((), dtype=torch.bfloat16)
    assert is_near_tie(zero, -zero)


def test_a_logit_that_is_no_number_is_no_tie():
    """float16 overflows in deep models; that must be reported as a mismatch, not raise."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        one, nan, inf = (torch.tensor(value, dtype=dtype) for value in (1.0, math.nan, math.inf))
        assert not is_near_tie(one, nan)
        assert not is_near_tie(nan, nan)
        assert not is_near_tie(one, inf)


def test_an_encoder_decoder_is_judged_by_what_its_encoder_read():
    """Its decoder alone would say another token, and the difference would be taken for a bug, or not."""
    from types import SimpleNamespace

    class Seq2Seq:
        device = "cpu"

        def __call__(self, input_ids, decoder_input_ids, use_cache):
            assert (input_ids.tolist(), decoder_input_ids.tolist()) == ([[7, 8]], [[0]])
            return SimpleNamespace(logits=torch.tensor([[[0.0, 1.0, 1.0, 5.0]]]))

    source = torch.tensor([7, 8])
    assert compare_outputs(Seq2Seq(), torch.tensor([0, 1]), torch.tensor([0, 2]), source) == "near_tie"
    assert compare_outputs(Seq2Seq(), torch.tensor([0, 1]), torch.tensor([0, 3]), source) == "mismatch"
