"""When to learn, and whether what was learnt may serve: schedule, rate, gate, and learners inline and beside serving. Of a call it knows what was kept of it."""
