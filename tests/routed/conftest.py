"""The target of routes."""

import pytest


@pytest.fixture(scope="module")
def target(tiny_llama):
    """What the routes serve."""
    return tiny_llama(layers=4)
