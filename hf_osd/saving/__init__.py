"""Disk and Hub: this room writes and reads checkpoints, states that survive a kill, repositories and model cards."""
