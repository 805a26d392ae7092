"""Deals with the machine: files that are whole or absent, threads, forks, random states and devices.

This room knows nothing of drafts.
"""
