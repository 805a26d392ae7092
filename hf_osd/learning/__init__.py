"""Decides when to learn and whether the result may serve: schedule, rate, gate, rollback, and learners inline and beside serving. It scores the draft where calls
went without it. It knows calls by the feedback they left, and nothing of how they ran."""
