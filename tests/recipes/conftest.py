"""The recipes are scripts, not a package: their tests find them as `python recipes/….py` would."""

import sys
from pathlib import Path

RECIPES = str(Path(__file__).parents[2] / "recipes")
if RECIPES not in sys.path:
    sys.path.insert(0, RECIPES)
