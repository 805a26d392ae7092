"""`WarnOnce` logs each warning once, though its cause recurs at every call."""

from __future__ import annotations

import logging


class WarnOnce:
    """Logs each message the first time it is given.

    Args:
        logger (`logging.Logger`): where to log.
    """

    def __init__(self, logger: logging.Logger):
        self._logger, self._given = logger, set()

    def __call__(self, message: str):
        if message not in self._given:
            self._given.add(message)
            self._logger.warning(message)
