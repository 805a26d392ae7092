"""`trouble`: names what is wrong with learning that goes on and changes nothing: every update fails, or leaves all weights as they were."""

from __future__ import annotations

# A first step may be one of a warm-up, at a rate of 0, and one failure be bad luck.
_TIMES = 2
FAILS = (
    "This draft learns nothing: every update of it has failed so far, for a reason that the log has. It serves as it came. Mend that, or "
    "pass learn=False, which saves the time."
)
STANDS = (
    "This draft learns nothing: updates end well and leave every weight bit for bit as it was. Something between its weights and its logits is cut, a forward "
    "that runs other weights, say; or the learning rate is 0. Load it anew with from_pretrained, or pass learn=False, which saves the time."
)
# For somebody who has asked for learning, and may look for a change.
WAITS = (
    "What was learnt does not serve yet: it is judged by requests that come after it, and those so far have not said that it is no worse than the draft as it "
    "came, which serves. Serve more, or pass gate=False, with which all that is learnt serves at once."
)


def trouble(failed: int, updates: int, unmoved: int) -> str | None:
    """Choose the warning, if there is one to give, by the number of updates that failed, of those that learnt, and of the last in a row that changed nothing."""
    if failed >= _TIMES and not updates:
        return FAILS
    return STANDS if unmoved >= _TIMES else None
