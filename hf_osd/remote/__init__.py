"""Learning elsewhere: in another process, or on another rank; and the choice of where. Frames carry tensors and plain values, and nothing that could run."""
