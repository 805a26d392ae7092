"""Stands between users and serving engines: an OpenAI-compatible proxy whose traffic teaches the engines' draft.

Knows requests and answers as text, feedback, and an assistant that learns. It knows no target, and computes nothing that an answer waits for.
"""
