"""What verification taught: the target's words at the positions of a request, kept in memory, in traces and as seen texts. It knows neither drafts nor learners."""
