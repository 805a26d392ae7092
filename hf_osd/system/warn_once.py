"""`WarnOnce`: warnings that are given once each, though what they are about happens at every call."""

from __future__ import annotations

import logging


class WarnOnce:
    """Logs each message at its first time.

    Args:
        logger (`logging.Logger`): where to.
    """

    def __init__(self, logger: logging.Logger):
        self._logger, self._given = logger, set()

    def __call__(self, message: str):
        if message not in self._given:
            self._given.add(message)
            self._logger.warning(message)
