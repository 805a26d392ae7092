"""What a process holds in memory."""

from __future__ import annotations

import resource
import sys


def peak_rss_mb() -> float:
    """The most memory that this process, with all that it has loaded, ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
