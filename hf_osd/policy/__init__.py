"""The policy: it decides how many tokens to draft and from which source, by estimates of acceptance and costs, and which of several drafts serves. It is pure arithmetic,
without torch; but for routing, which computes on vectors."""
