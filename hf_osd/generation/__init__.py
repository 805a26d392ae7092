"""Generation: one call of `generate`, with the seam into transformers, the checks, the candidates and the record of their verification. It asks `drafting` for
proposals and `policy` for their length; learning is not known here."""
