"""Writes and reads checkpoints, states that survive a kill, repositories on the Hub, and model cards."""
