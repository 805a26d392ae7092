"""Runs the learner elsewhere, in another process or on another rank, and chooses where. Frames carry tensors and plain values, and nothing that could run."""
