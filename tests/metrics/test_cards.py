"""Cards: in evaluate's form, of the columns and figures there are, and their examples say what they show."""

import doctest
import re
from pathlib import Path

import pytest

from hf_osd import metrics

HEADINGS = ["Metric Description", "How to Use", "Limitations and Bias", "Citation", "Further References"]


def card(name: str) -> str:
    return (Path(metrics.path(name)) / "README.md").read_text(encoding="utf-8")


def run(name: str, text: str):
    """The text's examples, in one namespace; at least one there must be."""
    test = doctest.DocTestParser().get_doctest(text, {}, name, name, 0)
    said: list[str] = []
    failed, tried = doctest.DocTestRunner().run(test, out=said.append)
    assert tried
    assert not failed, "".join(said)


@pytest.mark.parametrize("name", metrics.NAMES)
def test_examples_of_the_card_say_what_they_show(name):
    blocks = re.findall(r"```python\n(.*?)```", card(name), flags=re.DOTALL)
    assert all(block.startswith(">>> ") for block in blocks)
    run(name, "\n".join(blocks))


@pytest.mark.parametrize("name", metrics.NAMES)
def test_examples_of_the_inputs_description_say_what_they_show(name):
    run(name, metrics.load(name).inputs_description)


@pytest.mark.parametrize("name", metrics.NAMES)
def test_the_card_has_evaluates_parts_in_their_order(name):
    text = card(name)
    assert re.match(r"---\ntitle: .+\ntags:\n- evaluate\n- metric\n", text)
    assert re.findall(r"^## (.+)$", text, re.M) == HEADINGS
    assert re.findall(r"^### (.+)$", text, re.M) == ["Inputs", "Output Values", "Examples"]


@pytest.mark.parametrize("name", metrics.NAMES)
def test_the_card_and_the_description_name_every_configuration_column_and_option(name):
    metric = metrics.load(name)
    for config, layout in metric.LAYOUTS.items():
        for text in (card(name), metric.inputs_description):
            assert f'"{config}"' in text
            assert all(re.search(rf"\b{word}\b", text) for word in (*layout.columns, *layout.options))


@pytest.mark.parametrize("name", metrics.NAMES)
def test_the_card_cites_what_the_module_does(name):
    assert metrics.load(name).citation in card(name)
