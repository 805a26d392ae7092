"""Keeps the results of verification: the target's distributions at the positions of a request, in memory and in traces.

This room knows neither drafts nor learners.
"""
