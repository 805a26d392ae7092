"""Handles the draft as a model: copies that share weights, adapters, hot swaps of the serving weights, and reduced LM heads.

This room knows nothing of calls or of learning.
"""
