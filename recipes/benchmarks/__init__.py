"""Benchmarks: speed, costs, draft policies, bytes on the wire, and acceptance in another engine."""
