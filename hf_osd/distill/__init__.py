"""Learning: recorded feedback in, a better draft out. Knows nothing of generation."""
