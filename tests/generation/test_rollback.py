"""`Rollback` on caches alone: what a cache holds after blocks that were taken back is what one holds that never read them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_osd.generation.rollback import Rollback, can_roll_back, inconsistency, needs_rollback, rolling
from recipes.checks.recurrent import model_of

NAMES = ["Qwen3_5ForCausalLM", "FalconH1ForCausalLM", "KimiLinearForCausalLM"]
TEXT = torch.randint(2, 64, (1, 64), generator=torch.Generator().manual_seed(0))
WRONG = (TEXT + 7) % 62 + 2
_models = {}


def target_of(name):
    return _models.setdefault(name, model_of(name))


def cache_of(target):
    cache = DynamicCache(config=target.config.get_text_config(decoder=True))
    cache.activate_past_recording()
    return cache


def run_in_blocks(target, blocks, prompt=5):
    """Reads `TEXT` in blocks, each `(right, wrong)`; returns the cache, its rollback and how many tokens it is to hold."""
    cache = cache_of(target)
    run, at = Rollback(cache), prompt
    with torch.inference_mode(), run.installed():
        run.length(None)
        run.begin()
        run.without_carried(target(TEXT[:, :at], past_key_values=cache, use_cache=True))
        cache.crop(0)
        for right, wrong in blocks:
            length = run.length(1 + right + wrong)
            assert length == run.carried + 1 + right + wrong
            run.begin()
            ids = torch.cat([TEXT[:, : at + 1 + right], WRONG[:, at + 1 + right : at + 1 + right + wrong]], 1)
            run.without_carried(target(ids[:, -length:], past_key_values=cache, use_cache=True))
            cache.crop(-wrong)
            at += right + 1
            assert cache.get_seq_length() == at - run.carried
            assert run.carried == (0 if not wrong else length - wrong)
    assert "crop" not in vars(cache)
    return cache, run, at


def states_of(cache):
    """Lists all tensors that a cache works on, a convolution's past cut to its window."""
    found = []
    for layer in cache.layers:
        for i, state in getattr(layer, "conv_states", {}).items():
            if state is not None:
                found.append(state[..., -layer.conv_kernel_size[i] :])
        found += [state for state in getattr(layer, "recurrent_states", {}).values() if state is not None]
        found += [part for part in (getattr(layer, "keys", None), getattr(layer, "values", None)) if part is not None]
    return found


def check_states(target, cache, held):
    plain = cache_of(target)
    with torch.inference_mode():
        target(TEXT[:, :held], past_key_values=plain, use_cache=True)
    mine, theirs = states_of(cache), states_of(plain)
    assert len(mine) == len(theirs) > 0
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-3 * other.abs().max()


BLOCKS = [
    [(0, 2)],
    [(2, 0)],
    [(0, 0), (0, 0)],
    [(2, 2), (1, 2), (0, 0)],
    [(3, 1), (0, 1), (0, 1)],
    [(1, 3), (3, 0), (2, 1), (0, 0)],
    [(0, 4)] * 4,
    [(0, 1), (2, 0), (0, 2), (4, 0), (1, 1)],
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("blocks", BLOCKS)
def test_states_are_those_of_a_cache_that_never_read_what_was_rejected(name, blocks):
    target = target_of(name)
    cache, run, at = run_in_blocks(target, blocks)
    check_states(target, cache, at - run.carried)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_any_blocks(blocks):
    target = target_of("Qwen3_5ForCausalLM")
    cache, run, at = run_in_blocks(target, blocks)
    check_states(target, cache, at - run.carried)


@pytest.mark.parametrize("name", NAMES)
def test_there_is_one_copy_of_the_states_and_it_does_not_grow(name):
    target = target_of(name)
    _, few, _ = run_in_blocks(target, [(1, 1)])
    cache, many, _ = run_in_blocks(target, [(1, 1), (2, 1), (0, 2), (3, 0), (1, 2)] * 3)
    assert few.nbytes == many.nbytes > 0
    states = 0
    for layer in cache.layers:
        for i, state in getattr(layer, "conv_states", {}).items():
            states += state[..., -layer.conv_kernel_size[i] :].nbytes if state is not None else 0
        states += sum(state.nbytes for state in getattr(layer, "recurrent_states", {}).values() if state is not None)
    assert many.nbytes <= states * 1.25


def test_without_drafts_nothing_is_copied():
    _, run, _ = run_in_blocks(target_of("Qwen3_5ForCausalLM"), [(0, 0)] * 4)
    assert run.nbytes == 0


def test_more_cannot_be_taken_back_than_the_block():
    _, run, _ = run_in_blocks(target_of("Qwen3_5ForCausalLM"), [(1, 1)])
    run.length(2)
    run.begin()
    with pytest.raises(RuntimeError, match="nothing can be taken back"):
        run.crop(-2)


def test_outputs_by_position_lose_what_is_carried():
    _, run, _ = run_in_blocks(target_of("Qwen3_5ForCausalLM"), [(1, 1)])
    assert run.carried == 2
    states = (torch.arange(10.0).view(1, 5, 2),)
    attentions = (torch.arange(35.0).view(1, 1, 5, 7), None)
    outputs = run.without_carried({"hidden_states": states, "attentions": attentions, "logits": states[0]})
    assert torch.equal(outputs["hidden_states"][0], states[0][:, 2:])
    assert torch.equal(outputs["attentions"][0], attentions[0][..., 2:, :])
    assert outputs["attentions"][1] is None
    assert outputs["logits"].shape[1] == 5, "generate keeps the last rows itself"


def test_who_needs_it():
    target = target_of("Qwen3_5ForCausalLM")
    assert needs_rollback(target, cache_of(target))
    assert not needs_rollback(target, DynamicCache())
    assert not needs_rollback(target, None)
    assert can_roll_back(target)
    assert inconsistency(target) is None


@pytest.mark.parametrize(("limit", "named"), [((0.001, float("inf")), "0.001 to inf"), ((0.0, 0.1), "0 to 0.1")])
def test_a_limited_time_step_is_an_inconsistency(limit, named):
    target = model_of("FalconH1ForCausalLM")
    assert inconsistency(target) is None
    next(m for m in target.modules() if hasattr(m, "time_step_limit")).time_step_limit = limit
    assert named in inconsistency(target)


def test_a_view_is_of_the_targets_class_by_name():
    target, run = target_of("Qwen3_5ForCausalLM"), Rollback(DynamicCache())
    kind = rolling(type(target), lambda: run)
    assert issubclass(kind, type(target))
    assert (kind.__name__, kind.__module__) == (type(target).__name__, type(target).__module__)
