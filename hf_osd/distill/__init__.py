"""Distils recorded feedback into a better draft. It knows how to learn, not when, and nothing of generation."""
