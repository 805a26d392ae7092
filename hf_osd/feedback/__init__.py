"""The results of verification: this room keeps the target's distributions at the positions of a request, in memory and in traces. It knows neither drafts nor learners."""
