"""Caches of `evaluate` in the session's temporary folder, and rounds to measure."""

import pytest
from hypothesis import strategies as st


@pytest.fixture(scope="session", autouse=True)
def caches_of_the_session(tmp_path_factory):
    """One folder a process: Python imports the copies that `evaluate` makes of a module from the first it met."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_MODULES_CACHE", "HF_METRICS_CACHE"):
            patch.setattr(f"evaluate.config.{name}", str(tmp_path_factory.getbasetemp() / name))
        yield


@st.composite
def a_round(draw) -> tuple[int, int, int, int]:
    """`(drafted, tested, accepted, new_tokens)`; the bonus token is missing where the answer ended."""
    drafted = draw(st.integers(0, 5))
    accepted = draw(st.integers(0, drafted))
    ends = accepted > 0 and draw(st.booleans())
    return drafted, accepted if ends else min(accepted + 1, drafted), accepted, accepted + (not ends)


@pytest.fixture(scope="session")
def requests_of_rounds() -> st.SearchStrategy:
    """Up to four requests of up to six rounds each."""
    return st.lists(st.lists(a_round(), min_size=1, max_size=6), min_size=1, max_size=4)
