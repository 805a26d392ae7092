"""`OnlineConfig`: what it refuses, and that it survives the disk."""

import dataclasses
import json
import math
import re

import pytest

from hf_osd.config import CONFIG_NAME, REMOVED, RENAMED, OnlineConfig

NUMBERS = [
    f.name for f in dataclasses.fields(OnlineConfig) if f.type in ("int", "float", "int | None", "float | None")
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_assistant_tokens", 0),
        ("num_assistant_tokens", 2.5),
        ("num_assistant_tokens", True),
        ("lookahead", "dynamic"),
        ("draft_cost", 0.0),
        ("verify_cost", -0.1),
        ("verify_target", "sometimes"),
        ("top_k", 0),
        ("feedback_dtype", "int8"),
        ("buffer_bytes", 0),
        ("buffer_age", 0),
        ("update_interval", 0),
        ("positions", "some"),
        ("divergence", "kl"),
        ("beta", 1.5),
        ("total_variation_weight", -1),
        ("replay_ratio", -1),
        ("replay_ratio", float("nan")),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("learner_dtype", "float16"),
        ("decay_steps", 0),
        ("decay_steps", 2.5),
        ("ema_decay", 1),
        ("ema_decay", -0.1),
        ("ema_decay", float("nan")),
        ("optimism", -0.5),
        ("ensemble", []),
        ("ensemble", [1, 0]),
        ("ensemble", [1, "2"]),
        ("ensemble", [1, True]),
        ("ensemble", [float("nan")]),
        ("ensemble", 2),
        ("ensemble", "12"),
        ("sampled_columns", 0),
        ("sampled_columns", 100.0),
        ("gate_tolerance", -0.1),
        ("gate_tolerance", None),
        ("learning_rate", "fast"),
        ("learning_rate", math.inf),
        ("learning_rate", None),
        ("adapter", "qlora"),
        ("lora", 0),
        ("lora", 2.5),
        ("memory_budget", 0),
        ("memory_budget", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_field_and_value(field, value):
    with pytest.raises(ValueError, match=re.escape(f"`{field}` is {value!r}; ") + "(give|choose)"):
        OnlineConfig(**{field: value})


@pytest.mark.parametrize("field", NUMBERS)
def test_text_in_place_of_a_number_is_refused_by_field(field):
    """A config edited by hand: `"beta": "0.5"`. A comparison with it would raise a TypeError that names nothing."""
    with pytest.raises(ValueError, match=f"`{field}` is 'many'"):
        OnlineConfig(**{field: "many"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("draft_cost", None),
        ("buffer_age", None),
        ("batch_size", None),
        ("seed", None),
        ("beta", 0),
        ("replay_ratio", 0),
        ("warmup_steps", 0),
        ("num_assistant_tokens", 1),
        ("decay_steps", None),
        ("decay_steps", 1),
        ("ema_decay", 0),
        ("ema_decay", 0.999),
        ("optimism", 0),
        ("ensemble", None),
        ("ensemble", [0.5]),
        ("sampled_columns", None),
        ("sampled_columns", 1),
        ("gate_tolerance", 0),
        ("gate", False),
        ("learning_rate", "auto"),
        ("learning_rate", 1e-5),
        ("learning_budget", None),
        ("learning_budget", 1),
    ],
)
def test_the_edge_of_each_range_is_accepted(field, value):
    assert getattr(OnlineConfig(**{field: value}), field) == value


def test_there_are_some_forty_fields_at_most_in_four_parts_and_each_default_is_within_its_bound():
    fields = dataclasses.fields(OnlineConfig)
    assert len(fields) <= 42
    assert [field.name for part in reversed(OnlineConfig.__bases__) for field in dataclasses.fields(part)] == [
        field.name for field in fields
    ]
    for field in fields:
        bound = field.metadata["help"].bound
        assert bound.holds(bound.read(field.default))


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(OnlineConfig) if isinstance(f.default, bool)])
def test_a_switch_is_read_from_its_word_and_no_other(field):
    """`"gate": "false"` of a file edited by hand would be true."""
    assert getattr(OnlineConfig(**{field: "false"}), field) is False
    with pytest.raises(ValueError, match=f"`{field}` is 'no'; choose one of True, False"):
        OnlineConfig(**{field: "no"})


def test_a_learning_rate_that_came_as_text_is_a_number():
    """Flags know one type, and it may also be a word."""
    assert OnlineConfig(learning_rate="5e-3").learning_rate == 5e-3
    assert OnlineConfig().learning_rate == OnlineConfig(learning_rate="auto").learning_rate == "auto"


def test_the_paper_preset_is_algorithm_1():
    config = OnlineConfig.paper()
    assert (config.num_assistant_tokens, config.lookahead, config.update_interval) == (5, "constant", 8)
    assert (config.positions, config.divergence, config.total_variation_weight) == ("error", "forward_kl", 0.0)
    assert config.batch_size is None, "one optimizer step an update"


def test_the_paper_preset_has_nothing_that_came_later():
    config = OnlineConfig.paper()
    assert (config.replay_ratio, config.ema_decay, config.optimism, config.gate) == (0, 0, 0, False)
    assert (config.state_loss_weight, config.unrolled_steps) == (0, 1)
    assert config.learning_rate == 1e-4
    assert (config.ensemble, config.decay_steps, config.sampled_columns) == (None, None, None)


def test_the_paper_preset_takes_overrides():
    assert OnlineConfig.paper(learning_rate=3e-3).learning_rate == 3e-3


def test_a_saved_config_comes_back_the_same(tmp_path):
    config = OnlineConfig.paper(seed=3, draft_cost=0.2, buffer_age=60.0)
    config.save_pretrained(tmp_path / "new")
    assert OnlineConfig.from_json(tmp_path / "new" / CONFIG_NAME) == config


def test_an_ensemble_comes_back_the_same(tmp_path):
    config = OnlineConfig(ensemble=[1, 2.5], ema_decay=0.95, sampled_columns=None, decay_steps=100)
    assert OnlineConfig.from_dict(config.to_dict()) == config
    config.save_pretrained(tmp_path)
    assert OnlineConfig.from_json(tmp_path / CONFIG_NAME) == config
    config.to_dict()["ensemble"].append(3)
    assert config.ensemble == [1, 2.5], "a dict of one's own"


@pytest.mark.parametrize("name", REMOVED)
def test_a_field_that_is_gone_is_refused_by_name_and_loads_where_it_asked_for_what_is_done_now(name):
    said = re.escape(f"`{name}` is no field any more: {REMOVED[name][1]}.")
    for make in (OnlineConfig, OnlineConfig.paper, lambda **values: OnlineConfig.from_dict(values)):
        with pytest.raises(ValueError, match=said):
            make(**{name: "what it never was"})
    for value in REMOVED[name][0]:
        assert OnlineConfig.from_dict({"top_k": 7, name: value}) == OnlineConfig(top_k=7)
    assert name not in {field.name for field in dataclasses.fields(OnlineConfig)}


@pytest.mark.parametrize("name", RENAMED)
def test_a_field_of_another_name_is_refused_with_it_and_loads_from_a_saved_config(name):
    value = {"averaging": 0.5, "replay": 1.0}.get(name, 16)
    with pytest.raises(ValueError, match=f"`{name}` is called `{RENAMED[name]}` now"):
        OnlineConfig(**{name: value})
    assert getattr(OnlineConfig.from_dict({name: value}), RENAMED[name]) == value


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(ValueError, match="no key 'gamma', 'lr'") as error:
        OnlineConfig.from_dict({"lr": 1.0, "gamma": 3, "beta": 0.5})
    assert "learning_rate" in str(error.value), "the message lists the keys there are"


def test_a_config_without_a_bound_is_json_that_every_reader_takes(tmp_path):
    config = OnlineConfig(gate_tolerance=math.inf)
    config.save_pretrained(tmp_path)
    text = (tmp_path / CONFIG_NAME).read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert OnlineConfig.from_json(tmp_path / CONFIG_NAME) == config


def test_a_config_that_an_editor_put_a_byte_order_mark_before_is_read(tmp_path):
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"top_k": 7}), encoding="utf-8-sig")
    assert OnlineConfig.from_json(tmp_path / CONFIG_NAME).top_k == 7


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "3", json.dumps({"top_k": "64"})])
def test_a_damaged_file_is_a_value_error(tmp_path, text):
    (tmp_path / CONFIG_NAME).write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 (each has its own message)
        OnlineConfig.from_json(tmp_path / CONFIG_NAME)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        OnlineConfig.from_json(tmp_path / CONFIG_NAME)


@pytest.mark.parametrize(("written", "means"), [(True, "lora"), (False, "off"), ("False", "off"), ("auto", "auto")])
def test_an_adapter_is_read_as_yaml_has_it(written, means):
    """Where `off` is False."""
    assert OnlineConfig(adapter=written).adapter == means
