"""`micro_batches` splits the requests of an optimizer step into parts that are read one after another, so that a step takes no more memory for more requests."""

from __future__ import annotations

from collections.abc import Sequence

from hf_osd.feedback.feedback import Feedback

# The tokens of a part, padding included: two requests of the default `learning_window`.
TOKENS_AT_ONCE = 2048


def micro_batches(requests: Sequence[Feedback]) -> list[list[Feedback]]:
    """Split requests, in their order, into parts of at most `TOKENS_AT_ONCE` tokens when padded to the longest of the part; a longer request is a part alone."""
    parts: list[list[Feedback]] = []
    longest = 0
    for request in requests:
        length = max(len(request.tokens), 0 if request.source is None else len(request.source))
        longest = max(longest, length)
        if parts and (len(parts[-1]) + 1) * longest <= TOKENS_AT_ONCE:
            parts[-1].append(request)
        else:
            parts.append([request])
            longest = length
    return parts
