"""What learning would take in memory and what there is, and what therefore learns. Arithmetic: nothing here takes any of it."""

import dataclasses
import math

import pytest
import torch

from hf_osd import OnlineConfig, grow_feature_draft
from hf_osd.learning import memory
from hf_osd.learning.memory import GIB, LearningFacts, available, buffer_bytes, cgroup_left, choose, learning_bytes
from hf_osd.models.lora import adaptable, can_merge

# Of the size of a model of 1.2 billion weights in bfloat16.
LARGE = LearningFacts(
    trainable=1_000_000_000,
    frozen=200_000_000,
    adapted=900_000_000,
    ends=2_000_000,
    itemsize=2,
    hidden=2048,
    layers=16,
    heads=32,
    vocabulary=100_000,
    columns=50_000,
    autocast=True,
)
SMALL = dataclasses.replace(
    LARGE, trainable=1_000_000, adapted=900_000, ends=20_000, hidden=64, layers=2, columns=1000
)


def facts_of(model, **fields):
    linears = adaptable(model)
    trainable = {name for name, _ in model.named_parameters() if "layers" in name}
    return LearningFacts.of(model, trainable, linears, OnlineConfig(**fields), can_merge(linears))


def test_facts_are_those_of_the_draft(tiny_llama):
    """Counted by hand: q and o are 32x32, k and v 16x32, gate, up and down 64x32."""
    model = tiny_llama(layers=2)
    facts = facts_of(model, batch_size=3, ensemble=[1, 2])
    linears = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32
    assert facts.adapted == 2 * linears
    assert facts.trainable == 2 * (linears + 2 * 32)
    assert facts.frozen == 2 * 64 * 32 + 32
    assert facts.ends == 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert (facts.hidden, facts.layers, facts.heads, facts.vocabulary, facts.itemsize) == (32, 2, 4, 64, 4)
    assert (facts.tokens, facts.batch, facts.columns, facts.members) == (512, 3, 64, 2)
    assert (facts.merges, facts.quantised, facts.autocast, facts.averages, facts.apart) == (
        True,
        False,
        False,
        True,
        False,
    )


def test_all_columns_are_reckoned_with_where_none_are_drawn(tiny_llama):
    assert facts_of(tiny_llama(), sampled_columns=None).columns == 64
    assert facts_of(tiny_llama(), sampled_columns=32).columns == 64, "so many are no fewer than half"
    assert facts_of(tiny_llama(), sampled_columns=31).columns == 32
    assert facts_of(tiny_llama(), ema_decay=0.0).averages is False
    assert facts_of(tiny_llama(), learn="process").apart is True
    assert facts_of(tiny_llama(), batch_size=None, update_interval=8, replay_ratio=6.0).batch == 56


def test_the_estimate_adds_up_what_is_kept_of_each_weight():
    bare = LearningFacts(trainable=1000, frozen=500, adapted=800, ends=30, itemsize=2, autocast=True)
    # Master, gradient, two moments, average; three snapshots of weights and average; three drafts and the second serving copy in 16 bits.
    assert learning_bytes(bare) == 1000 * (4 + 4 + 8 + 4 + 3 * 8 + 3 * 2 + 2)
    assert learning_bytes(bare, 4) == 120 * (4 + 4 + 8 + 4 + 3 * 8 + 3 * 4) + 2 * 800 * 2
    no_average = dataclasses.replace(bare, averages=False)
    assert learning_bytes(no_average) == 1000 * (4 + 4 + 8 + 3 * 4 + 3 * 2 + 2)
    apart = dataclasses.replace(bare, merges=False)
    assert learning_bytes(apart, 4) == 120 * (4 + 4 + 8 + 4 + 3 * 8 + 3 * 4 + 2 * 4)
    # Without autocast the learner's forward is in float32, over float32 copies of what it else shares.
    assert learning_bytes(dataclasses.replace(bare, autocast=False)) - learning_bytes(bare) == 4 * 500
    assert learning_bytes(dataclasses.replace(bare, autocast=False), 4) - learning_bytes(bare, 4) == 4 * 1500
    assert learning_bytes(dataclasses.replace(bare, apart=True)) - learning_bytes(bare) == 2 * 1500


def test_activations_grow_with_text_batch_and_layers_and_with_its_square_where_scores_are_stored():
    assert SMALL.activations == 2 * 1024 * 2 * 64 * 34 + 1024 * 2 * 1000 * 16
    assert dataclasses.replace(SMALL, eager=True).activations - SMALL.activations == 2 * 5 * 32 * 1024 * 1024 * 2
    assert dataclasses.replace(SMALL, autocast=False).activations - SMALL.activations == 2 * 1024 * 2 * 64 * 34


def test_no_more_is_kept_of_a_larger_batch_than_is_read_at_once():
    few, many = (dataclasses.replace(SMALL, batch=batch, steps=3, state=1728, eager=True) for batch in (2, 8))
    assert many.activations - few.activations == 6 * 1024 * 1728 * 4, "but the states of all its requests"
    assert dataclasses.replace(SMALL, batch=1).activations == SMALL.activations / 2
    short = dataclasses.replace(SMALL, tokens=256)
    assert dataclasses.replace(short, batch=8).activations == 4 * short.activations
    assert dataclasses.replace(short, batch=16).activations == 4 * short.activations
    long = dataclasses.replace(SMALL, tokens=4096)
    assert long.activations == dataclasses.replace(long, batch=1).activations


def test_a_feature_draft_of_a_small_target_learns_in_large_batches():
    """The sizes of SmolLM2-135M's. A step over eight texts of 1,024 tokens took 1.0 GiB here on the CPU in bfloat16, and 2.0 GiB where almost half of the columns were drawn."""
    facts = LearningFacts(
        trainable=5_100_000,
        frozen=56_600_000,
        itemsize=2,
        hidden=576,
        layers=1,
        heads=9,
        vocabulary=49152,
        batch=8,
        columns=49152 // 2,
        eager=True,
        autocast=True,
        steps=3,
        state=4 * 576,
    )
    assert 2 * GIB < facts.activations < 3 * GIB
    assert choose(facts, "auto", 16, 8 * GIB).learns


def test_small_drafts_learn_with_all_weights_and_large_ones_in_an_adapter():
    assert choose(SMALL, "auto", 16, 16 * GIB) == choose(SMALL, "off", 16, 16 * GIB)
    choice = choose(LARGE, "auto", 16, 64 * GIB)
    assert (choice.learns, choice.rank) == (True, 16)
    assert "where all weights would take" in choice.sentence
    assert choose(LARGE, "off", 16, 200 * GIB).rank is None, "unless asked otherwise"
    assert choose(SMALL, "lora", 4, 16 * GIB).rank == 4


def test_the_border_is_a_fifth_of_what_is_free_and_four_gib():
    needed = learning_bytes(SMALL)
    assert choose(SMALL, "auto", 1, 5 * needed + 5).rank is None
    assert choose(SMALL, "auto", 1, 5 * needed - 5).rank == 1
    # Activations of 4 GiB in all: what is free does not matter any more.
    wide = dataclasses.replace(SMALL, columns=1000 + (4 * GIB - needed) // (1024 * 2 * 16))
    assert 4 * GIB - 2**16 < learning_bytes(wide) <= 4 * GIB
    assert choose(wide, "auto", 16, math.inf).rank is None
    assert choose(dataclasses.replace(wide, columns=wide.columns + 4), "auto", 16, math.inf).rank == 16


def test_the_rank_comes_down_by_halves_until_it_fits():
    for rank in (16, 8, 4, 2, 1):
        choice = choose(LARGE, "auto", 16, math.inf, budget=learning_bytes(LARGE, rank))
        assert (choice.learns, choice.rank) == (True, rank)
        assert ("and rank 16" in choice.sentence) == (rank < 16)
    assert choose(LARGE, "lora", 12, math.inf, budget=learning_bytes(LARGE, 5)).rank == 3
    assert choose(LARGE, "lora", 16, 2 * learning_bytes(LARGE, 2)).rank == 2, (
        "half of what is free, if there is no budget"
    )


@pytest.mark.parametrize("adapter", ["auto", "lora", "off"])
def test_where_nothing_fits_learning_is_off_and_one_sentence_says_how_to_mend_it(adapter):
    choice = choose(LARGE, adapter, 16, 8 * GIB, budget=2**20)
    assert (choice.learns, choice.rank) == (False, None)
    assert "\n" not in choice.sentence
    for words in ("Learning is off", "1.0 MiB", "Raise memory_budget", "lower batch_size", "learn=False"):
        assert words in choice.sentence
    assert ("adapter='auto'" in choice.sentence) == (adapter == "off")
    assert memory.size(learning_bytes(LARGE, None if adapter == "off" else 1)) in choice.sentence
    assert "half of the 1.0 GiB that are free" in choose(LARGE, adapter, 16, GIB).sentence


def test_an_adapter_of_the_drafts_own_is_kept_whatever_is_asked():
    own = dataclasses.replace(LARGE, trainable=1_000_000, frozen=1_199_000_000, adapted=0, ends=0)
    for adapter in ("auto", "lora", "off"):
        choice = choose(own, adapter, 16, 64 * GIB, has_adapter=True)
        assert (choice.learns, choice.rank) == (True, None)
        assert "came with" in choice.sentence
    assert not choose(own, "auto", 16, GIB, has_adapter=True).learns


def test_of_quantised_layers_an_adapter_learns_and_not_what_little_is_left_in_floats():
    assert choose(dataclasses.replace(SMALL, quantised=True, trainable=1000), "auto", 16, 64 * GIB).rank == 16


def test_a_draft_without_linear_layers_learns_with_all_weights_if_they_fit():
    bare = dataclasses.replace(LARGE, adapted=0, ends=0)
    assert choose(bare, "auto", 16, 200 * GIB).rank is None
    assert not choose(bare, "auto", 16, 8 * GIB).learns


def cgroup(tmp_path, line, **files):
    (tmp_path / "cgroup").write_text(f"{line}\n")
    for path, text in files.items():
        path = tmp_path / "fs" / path.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return cgroup_left(tmp_path / "fs", tmp_path / "cgroup")


def test_a_control_group_of_version_2_bounds_what_is_free(tmp_path):
    files = {"a__memory_dot_max": 1000, "a__memory_dot_current": 700}
    assert cgroup(tmp_path, "0::/a", **files) == 300


def test_files_that_are_cached_are_free(tmp_path):
    files = {"memory_dot_max": 1000, "memory_dot_current": 700, "memory_dot_stat": "anon 100\ninactive_file 250"}
    assert cgroup(tmp_path, "0::/", **files) == 550


def test_the_tightest_of_nested_groups_counts(tmp_path):
    inner = {"a__b__memory_dot_max": "max", "a__b__memory_dot_current": 10}
    outer = {"a__memory_dot_max": 500, "a__memory_dot_current": 460, "memory_dot_max": 900, "memory_dot_current": 1}
    assert cgroup(tmp_path, "0::/a/b", **inner, **outer) == 40


def test_a_control_group_of_version_1_bounds_it_too(tmp_path):
    top = "memory__memory_dot_"
    files = {f"{top}limit_in_bytes": 1000, f"{top}usage_in_bytes": 900, f"{top}stat": "total_inactive_file 50"}
    # In a container the path is the host's, which is not seen there.
    assert cgroup(tmp_path, "4:memory:/docker/0123", **files) == 150


def test_without_a_limit_there_is_none(tmp_path):
    assert cgroup(tmp_path, "0::/a", **{"a__memory_dot_max": "max", "a__memory_dot_current": 5}) == math.inf
    assert cgroup_left(tmp_path, tmp_path / "nothing") == math.inf
    assert cgroup(tmp_path, "0::/../up") == math.inf


def test_a_group_that_is_over_its_limit_leaves_nothing(tmp_path):
    assert cgroup(tmp_path, "0::/", memory_dot_max=100, memory_dot_current=130) == 0


def test_of_the_cpu_the_smaller_of_machine_and_group_is_free(monkeypatch):
    assert 0 < available("cpu") < math.inf
    monkeypatch.setattr(memory, "cgroup_left", lambda: 12345)
    assert available(torch.device("cpu")) == 12345


def test_of_cuda_what_the_allocator_holds_in_reserve_is_free_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert available("cuda:0") == 1200


def test_of_a_device_that_nobody_knows_anything_fits():
    assert available("meta") == math.inf
    assert available("no such device") == math.inf


@pytest.mark.parametrize(("free", "states"), [(math.inf, 2**17), (8 * (2**26 + 136_000), 1000), (2**20, 0)])
def test_the_buffer_has_room_for_the_states_that_a_draft_reads(tiny_llama, monkeypatch, free, states):
    """A state is 4 · 32 bytes, the last layer's with it, and two more a layer."""
    monkeypatch.setattr(memory, "available", lambda device: free)
    reader, other = grow_feature_draft(tiny_llama(layers=4)), tiny_llama(layers=1)
    assert buffer_bytes(reader, OnlineConfig()) // 136 == (2**26 + 136 * states) // 136
    assert buffer_bytes(other, OnlineConfig()) == buffer_bytes(None, OnlineConfig()) == 2**26
    assert buffer_bytes(reader, OnlineConfig(buffer_bytes=1000)) == 1000
