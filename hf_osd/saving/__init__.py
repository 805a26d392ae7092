"""Disk and Hub: checkpoints, states that survive a kill, repositories, cards."""
