"""The law of imports, by reading the code: who serves and who learns meet in data and weights alone, nothing below knows the roof, and no files go in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "hf_osd"
SERVES, LEARNS = {"generation", "drafting", "policy"}, {"distill", "learning", "remote"}
ROOF = {"hf_osd.assistant", "hf_osd.routed", "hf_osd.cli"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in ROOT.rglob("*.py")}
ROOF |= {name for name in FILES if name.startswith("hf_osd.engines.")}


def imported(name: str) -> set[str]:
    """The files of ours that one imports, at its top, in a function or for types; but for the package itself, which has public names and the version."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & FILES.keys()) - {name, "hf_osd"}


IMPORTS = {name: imported(name) for name in FILES}


def room(name: str) -> str:
    return [*name.split("."), ""][1]


def test_the_files_are_read():
    assert len(FILES) > 60
    assert "hf_osd.learning.gate" in IMPORTS["hf_osd.learning.contenders"]
    assert "hf_osd.assistant" in IMPORTS["hf_osd"]


@pytest.mark.parametrize(("some", "others"), [(SERVES, LEARNS), (LEARNS, SERVES)])
def test_who_serves_and_who_learns_do_not_import_each_other(some, others):
    assert not {(a, b) for a, found in IMPORTS.items() for b in found if room(a) in some and room(b) in others}


def test_nothing_below_imports_the_roof():
    assert not {(a, b) for a, found in IMPORTS.items() for b in found & ROOF if a not in ROOF | {"hf_osd"}}


def test_no_files_import_each_other_in_a_circle():
    left = {name: set(found) for name, found in IMPORTS.items()}
    while free := {name for name, found in left.items() if not found & left.keys()}:
        left = {name: found for name, found in left.items() if name not in free}
    assert not left


@pytest.mark.parametrize("folder", sorted(path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()))
def test_each_room_says_what_it_is(folder):
    assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
