"""When to learn, and whether what was learnt may serve: schedule, rate, gate, and learners inline and beside serving; and how the draft would have done where it
was not asked. Of a call it knows what was kept of it."""
