"""The recipes' folders: what each may import, and that every recipe named anywhere exists."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "benchmarks", "experiments", "checks")
TEXTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", *(ROOT / "docs").glob("*.md")]
TEXTS += [path for folder in ("recipes", "hf_osd", "tests") for path in (ROOT / folder).rglob("*.py")]
TEXTS += (ROOT / "recipes" / "configs").glob("*.yaml")


def imported(path: Path) -> set[str]:
    """The modules of recipes that a file imports, at its top or in a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] == "recipes"}


@pytest.mark.parametrize("room", ["distill.py", *ROOMS])
def test_a_room_imports_itself_and_what_is_common(room):
    place = ROOT / "recipes" / room
    files = [place] if place.is_file() else sorted(place.glob("*.py"))
    found = {name for path in files for name in imported(path)}
    assert {name.split(".")[1] for name in found} <= {room, "common"}
    assert room == "common" or "recipes.common.command" in found


def test_the_library_imports_no_recipe():
    assert not [path for path in (ROOT / "hf_osd").rglob("*.py") if imported(path)]


def test_each_recipe_that_is_named_is_there():
    """In docs, comments, docstrings and messages; and that what is to be run by its name can be."""
    text = "".join(path.read_text(encoding="utf-8") for path in TEXTS)
    named = set(re.findall(r"(?<!/)\brecipes/[\w/]+\.(?:py|yaml)\b", text))
    run = set(re.findall(r"-m (recipes(?:\.\w+)+)", text))
    named |= {f"{name.replace('.', '/')}.py" for name in run}
    assert len(named) > 12
    assert not [name for name in named if not (ROOT / name).is_file()]
    for name in run:
        module = (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert 'if __name__ == "__main__":' in module, f"{name} cannot be run"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(("said", "draft"), [((), None), (("DEMO_DRAFT=feature",), "--draft feature")])
def test_the_demo_takes_another_draft(said, draft):
    lines = subprocess.run(["make", "-n", "demo", *said], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    job = next(line for line in lines.splitlines() if "recipes/distill.py" in line)
    assert "--config recipes/configs/demo.yaml" in job
    assert (draft in job) if draft else ("--draft" not in job)
