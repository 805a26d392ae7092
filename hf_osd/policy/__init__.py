"""The policy: it decides how many tokens to draft and from which source, by estimates of acceptance and costs. It is pure arithmetic, without torch."""
