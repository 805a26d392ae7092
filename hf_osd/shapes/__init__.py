"""Chooses the shape of a draft for a target that has none: what it costs on this machine, what it learns in a short time, and how fast that makes decoding. It uses
both those who serve and those who learn; of the library only the command line uses it."""
