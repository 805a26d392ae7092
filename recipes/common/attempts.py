"""Steps at the end of a run that must not cost each other: a failed save is remembered, a failed display is a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable

logger = logging.getLogger("hf_osd.recipes.attempts")


class Saves:
    """Saves one thing after the other, whatever becomes of each; `errors` holds the exceptions, in order."""

    def __init__(self):
        self.errors: list[Exception] = []

    def attempt(self, save: Callable, *args, **kwargs):
        """Call `save(*args, **kwargs)`; an exception is logged and kept for the end of the run."""
        try:
            save(*args, **kwargs)
        except Exception as error:
            logger.error("%s", error)
            self.errors.append(error)

    def check(self):
        """Raise the first exception, if there was one."""
        if self.errors:
            raise self.errors[0]


def attempt_to_show(what: str, show: Callable, *args):
    """Call `show(*args)`, which only displays something: an exception is a warning that `what` was left out."""
    try:
        show(*args)
    except Exception as error:
        logger.warning("Left out: %s (%r).", what, error)
