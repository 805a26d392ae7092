"""`compare_outputs`: a near-tie is told from a bug, at the first token where two outputs differ."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_osd.metrics import parity
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


# In half precision.


def parted(model, prefix, gap: float):
    """`model`, of which the two likeliest tokens after `prefix` differ by `gap` in float32; and the two outputs that end with these."""
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(input_ids=prefix[None]).logits[0, -1]
        first, second = exact.topk(2).indices
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(exact), dtype=model.dtype))
        model.lm_head.bias[second] = exact[first] - exact[second] - gap
    return [torch.cat([prefix, token[None]]) for token in (first, second)]


def bf16(tiny_llama, **config):
    model = tiny_llama(vocab=64, **config).to(torch.bfloat16)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    return model


def test_in_half_precision_the_float32_logits_of_the_same_weights_judge(tiny_llama, monkeypatch):
    """A forward in bf16 rounds by more than what is in question: here it is made to say that all logits tie, and then that none do."""
    model, prefix = bf16(tiny_llama), torch.arange(5, 12)
    for gap, verdict in ((0.001, "near_tie"), (0.5, "mismatch")):
        outputs = parted(model, prefix, gap)
        for said in (torch.zeros(64), torch.arange(64.0)):
            forward, dtypes = type(model).forward, []

            def lies(self, *args, said=said, forward=forward, dtypes=dtypes, **kwargs):
                output = forward(self, *args, **kwargs)
                dtypes.append(output.logits.dtype)
                if output.logits.dtype == torch.bfloat16:
                    output.logits[:] = said.to(torch.bfloat16)
                return output

            monkeypatch.setattr(type(model), "forward", lies)
            assert compare_outputs(model, *outputs) == verdict
            monkeypatch.undo()
            assert dtypes == [torch.bfloat16, torch.float32]


def test_judging_leaves_the_target_as_it_is(tiny_llama):
    model, prefix = bf16(tiny_llama), torch.arange(5, 12)
    outputs = parted(model, prefix, 0.5)
    before = {name: (p, p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    compare_outputs(model, *outputs, prompt_length=4)
    assert {name: (p, p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_tie_of_plain_decodings_own_logits_is_one_too(tiny_llama, monkeypatch):
    model, prefix = bf16(tiny_llama), torch.arange(5, 12)
    outputs = parted(model, prefix, 0.5)
    tied = torch.zeros(64)
    seen = []
    monkeypatch.setattr(parity, "_decoded_logits", lambda target, prompt, n: seen.append((prompt.tolist(), n)) or tied)
    assert compare_outputs(model, *outputs) == "mismatch"
    assert compare_outputs(model, *outputs, prompt_length=4) == "near_tie"
    assert seen == [([[5, 6, 7, 8]], 3)]


def test_plain_decodings_logits_are_those_that_generate_has(tiny_llama):
    model = bf16(tiny_llama, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    prompt = torch.tensor([[5, 9, 11]])
    asked = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(prompt, **asked)
    for n in range(6):
        assert torch.equal(parity._decoded_logits(model, prompt, n), whole.logits[n][0])
    ends = int(whole.sequences[0, 5])
    model.generation_config.eos_token_id = ends
    assert parity._decoded_logits(model, prompt, 5) is None


def test_without_float32_logits_the_serving_dtype_judges_and_says_so(tiny_llama, monkeypatch, caplog):
    model, prefix = bf16(tiny_llama), torch.arange(5, 12)
    outputs = parted(model, prefix, 0.5)
    monkeypatch.setattr(parity, "_widen_while_it_runs", lambda module: pytest.fail("it cannot be"))
    monkeypatch.setattr(parity.copy, "deepcopy", lambda *args: 1 / 0)
    assert compare_outputs(model, *outputs) == "mismatch"
    assert "No float32 logits of LlamaForCausalLM could be had (ZeroDivisionError" in caplog.text
