"""`Beside`: how much learning in the background slows serving, and how fast it learns meanwhile."""

from __future__ import annotations

import time

from hf_osd import OnlineAssistant, OnlineConfig
from recipes.benchmarks.workload import Workload
from recipes.common.figures import spread

MODES = ("off", "background", "process")
# Learning runs in full and changes next to nothing, so that the drafts, and with them the speed, are the same in every mode.
_TINY_RATE = 1e-12


class Beside:
    """Serves the same requests in turn without learning, and with learning in a thread and in a process."""

    def __init__(self, args, config: OnlineConfig):
        self.args, self.work = args, Workload(args, config.seed)
        fixed = {"lookahead": "constant", "suffix_cache": False, "learning_rate": _TINY_RATE}
        self.config = {**config.to_dict(), **fixed}

    def measure(self) -> dict:
        """Return the figures of each mode of `learn`."""
        assistants = {
            mode: OnlineAssistant(self.work.draft, OnlineConfig(**{**self.config, "learn": mode})) for mode in MODES
        }
        try:
            return self._measure(assistants)
        finally:
            for assistant in assistants.values():
                assistant.close()

    def _measure(self, assistants: dict[str, OnlineAssistant]) -> dict:
        for mode, assistant in assistants.items():  # until thread and process have started and learnt once
            for request in self.work.warm_up:
                self.work.generate(request, assistant_model=assistant)
            if mode != "off":
                assistant.flush()
        rates: dict[str, list[float]] = {mode: [] for mode in MODES}
        learnt: dict[str, list[float]] = {mode: [] for mode in MODES}
        for repeat in range(self.args.repeats):
            at = repeat % len(MODES)
            for mode in (*MODES[at:], *MODES[:at]):
                rate, tokens = self._block(assistants[mode])
                rates[mode].append(rate)
                if tokens is not None:
                    learnt[mode].append(tokens)
        figures = {}
        for mode in MODES:
            stats = assistants[mode].stats
            figures[mode] = {
                "tokens_per_second": spread(rates[mode]),
                "speed_beside_off": spread([rate / off for rate, off in zip(rates[mode], rates["off"], strict=True)]),
                "learned_tokens_per_second": spread(learnt[mode]) if learnt[mode] else None,
                "updates": stats.updates,
                "failed_updates": stats.failed_updates,
                "draft_version": stats.draft_version,
            }
        return figures | {"requests_a_block": self.args.requests, "blocks": self.args.repeats}

    def _block(self, assistant: OnlineAssistant) -> tuple[float, float | None]:
        """Serve all requests with one assistant: a block. What is left to learn is learnt after it.

        Returns:
            `tuple[float, float | None]`: new tokens a second of the block, and learnt tokens a second between its first and its last update, `None` if fewer
            than two updates ended within it.
        """
        ends: list[tuple[float, int]] = []
        learned = assistant.stats.learned_tokens
        tokens, start = 0, time.perf_counter()
        for request in self.work.requests:
            tokens += self.work.generate(request, assistant_model=assistant).new
            assistant.update()
            if (now := assistant.stats.learned_tokens) != learned:
                learned = now
                ends.append((time.perf_counter(), now))
        rate = tokens / (time.perf_counter() - start)
        if assistant.learner is not None:
            assistant.flush()
        if len(ends) < 2:
            return rate, None
        (first, before), (last, after) = ends[0], ends[-1]
        return rate, (after - before) / (last - first)
