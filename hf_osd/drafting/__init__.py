"""Candidates: what the draft model, the suffix cache and the text so far propose, in the target's tokens. It knows nothing of calls, and of learning nothing."""
