"""Brings a learnt draft into other engines that serve, while they run.

Each module runs in its engine's environment, and needs the engine and nothing else of hf_osd.
"""
