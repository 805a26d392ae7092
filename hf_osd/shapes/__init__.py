"""Chooses the shape of a draft for a target that has none: what it costs on this machine, what it learns in a short time, and how fast that makes decoding. Above those
who serve and those who learn, and below the assistant: nothing but the command line imports it."""
