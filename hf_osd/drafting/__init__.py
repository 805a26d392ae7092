"""Drafting: the draft model, the suffix cache and the text so far propose tokens, in the target's vocabulary. Calls and learning are not known here."""
