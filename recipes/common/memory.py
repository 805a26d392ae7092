"""Memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_rss_mb() -> float:
    """Return the largest resident memory this process has had so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
