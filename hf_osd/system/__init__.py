"""The machine: this room has files that are whole or absent, threads, forks, random states and devices. It knows nothing of drafts."""
