"""Experiments: record answers of the target once, and compare settings of the learner on them."""
