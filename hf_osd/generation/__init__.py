"""One call of `generate`: how an assistant comes into it, what is served and what refused, candidates and the record of what the target said of them. It knows what
drafts and how long a block may be by asking `drafting` and `policy`; of learning it knows nothing."""
