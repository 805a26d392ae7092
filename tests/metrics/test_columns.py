"""What all metrics have in common: where they are found, what is refused, and evaluate's ways of adding rows."""

import importlib
import subprocess
import sys
import threading
from configparser import ConfigParser
from pathlib import Path

import evaluate
import pytest

from hf_osd import metrics
from hf_osd.metrics.columns import FAMILY

ROOT = Path(__file__).parents[2]


def layouts() -> dict:
    """Of each metric, by configuration."""
    found = {name: metrics.load(name).LAYOUTS for name in metrics.NAMES}
    assert all(found.values())
    return found


def test_metrics_load_from_their_folders_without_a_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    for name in metrics.NAMES:
        assert evaluate.load(metrics.path(name)).name == name


def test_importing_the_helper_loads_nothing_heavy():
    code = "import sys, hf_osd.metrics; hf_osd.metrics.path('speedup'); print({'torch', 'evaluate', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "set()\n"


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(
        ValueError, match="'acceptance'; choose one of 'acceptance_rate', 'accepted_length', 'speedup'"
    ):
        metrics.path("acceptance")


def test_an_unknown_configuration_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="'lives'; choose one of 'default', 'sampled', 'live'"):
        metrics.load("acceptance_rate", "lives")


def test_all_of_a_metric_is_in_a_wheel():
    config = ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    folder = Path(metrics.__file__).parent
    data = {
        file for pattern in config["options.package_data"]["hf_osd.metrics"].split() for file in folder.glob(pattern)
    }
    for name in metrics.NAMES:
        importlib.import_module(f"hf_osd.metrics.{name}.{name}")  # a package's modules are found by themselves
        assert (folder / name / "__init__.py").is_file()
        assert folder / name / "README.md" in data


def test_the_family_is_every_column_and_option():
    known = [layout for of_one in layouts().values() for layout in of_one.values()]
    assert set().union(*(layout.columns for layout in known), *(layout.options for layout in known)) == FAMILY


def test_one_by_one_in_batches_and_at_once_are_the_same():
    rows = {"accepted": [3, 0, 5, 1], "tested": [4, 1, 5, 2]}
    at_once = metrics.load("acceptance_rate", "live").compute(**rows)
    metric = metrics.load("acceptance_rate", "live")
    metric.add(accepted=3, tested=4)
    metric.add_batch(accepted=[0, 5], tested=[1, 5])
    assert len(metric) == 3
    assert metric.compute(accepted=[1], tested=[2]) == at_once


def test_figures_can_be_kept_in_memory():
    metric = metrics.load("acceptance_rate", "live", keep_in_memory=True)
    assert metric.compute(accepted=[3, 0], tested=[4, 0], level=None) == {"alpha_live": 0.75}


def test_combined_metrics_take_each_its_own_columns_and_options():
    names = [metrics.load("acceptance_rate", "live"), metrics.path("accepted_length")]
    rows = {"accepted": [6, 2], "tested": [8, 2], "new_tokens": [9, 6], "rounds": [3, 5]}
    expected = {"alpha_live": 0.8, "accepted_length": 1.0, "tokens_per_round": 1.875}
    assert evaluate.combine(names).compute(**rows, level=None) == expected
    combined = evaluate.combine(names)
    combined.add_batch(**rows)
    assert combined.compute(level=None) == expected


def test_what_several_processes_added_is_gathered_in_the_first(tmp_path):
    found = {}

    def work(rank: int):
        settings = {"num_process": 2, "process_id": rank, "experiment_id": "two", "cache_dir": str(tmp_path)}
        metric = metrics.load("acceptance_rate", "live", **settings)
        metric.add(accepted=1 + rank, tested=2)
        found[rank] = metric.compute(level=None)

    metrics.load("acceptance_rate")  # the import is no part of it
    workers = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert found == {0: {"alpha_live": 0.75}, 1: None}


def test_a_row_that_is_refused_leaves_the_others():
    metric = metrics.load("acceptance_rate", "live")
    metric.add(accepted=1, tested=2)
    with pytest.raises(ValueError, match=r"Row 1: `accepted` is 3 and `tested` 2; .* count it there too"):
        metric.add_batch(accepted=[0, 3], tested=[5, 2])
    assert metric.compute(level=None) == {"alpha_live": 0.5}


def test_columns_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"`accepted` has 2, `tested` has 1; give lists of the same length"):
        metrics.load("acceptance_rate", "live").compute(accepted=[1, 2], tested=[2])


@pytest.mark.parametrize("add", ["add", "add_batch", "compute"])
def test_a_missing_column_is_named(add):
    metric = metrics.load("acceptance_rate", "live")
    with pytest.raises(ValueError, match="tested: missing; the configuration 'live' takes accepted, tested, level"):
        getattr(metric, add)(accepted=1 if add == "add" else [1])


def test_an_unknown_option_is_refused_before_anything_is_lost():
    metric = metrics.load("acceptance_rate", "live")
    metric.add(accepted=1, tested=2)
    with pytest.raises(ValueError, match="levle: unknown; the configuration 'live' takes accepted, tested, level"):
        metric.compute(levle=0.9)
    assert metric.compute(level=None) == {"alpha_live": 0.5}


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match=r"\['drafts'\]"):
        metrics.load("acceptance_rate", "live").add(accepted=1, tested=2, drafts=3)


def test_columns_of_another_configuration_name_it():
    with pytest.raises(ValueError, match="accepted, tested would fit another: load 'live' or 'rounds'"):
        metrics.load("acceptance_rate").compute(accepted=[1], tested=[2])


def test_computing_before_anything_was_added_says_what_to_give():
    with pytest.raises(ValueError, match="no rows: the configuration 'default' takes predictions, references"):
        metrics.load("acceptance_rate").compute()


@pytest.mark.parametrize("name", metrics.NAMES)
def test_figures_of_no_rows_are_nan_and_intervals_unbounded(name):
    for config, layout in metrics.load(name).LAYOUTS.items():
        options = {"c": 0.2, "v": [1.0]} if "c" in layout.options else {}
        figures = metrics.load(name, config).compute(**{column: [] for column in layout.columns}, **options)
        for figure, value in figures.items():
            if figure.endswith("_low"):
                assert value == 0
            elif figure.endswith("_high"):
                assert value == (1 if name == "acceptance_rate" else float("inf"))
            else:
                assert value != value or value in (0, [])
