"""`RunReport`: summary.json, curves.png and the table at the end of a run. Figures are named as in docs/figures.md."""

from __future__ import annotations

import os
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_osd.system.files import staged
from hf_osd.system.strict_json import write_json
from recipes.common.figures import aligned, cell, mean, ratio, shown
from recipes.common.run_log import RunLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd import OnlineAssistant
    from recipes.common.models import ModelArguments


class RunReport:
    """Computes the figures of a [`RunLog`], by domain.

    Args:
        log (`RunLog`): the run.
        overall (`dict`): figures and settings of the whole run.
        skipped (`dict[str, int]`): prompts that were skipped, by domain.
        held_back (`dict[str, int]`): prompts that α before and after are measured on, by domain.
    """

    def __init__(self, log: RunLog, overall: dict, skipped: dict[str, int], held_back: dict[str, int]):
        self.log = log
        domains = {
            name: self._domain(name) | {"held_back": held_back[name], "skipped": skipped[name]} for name in skipped
        }
        self.summary = {"domains": domains, "overall": overall}

    def write(self, output_dir: str | os.PathLike):
        """Write summary.json, whole or not at all; unknown figures are null."""
        write_json(Path(output_dir) / "summary.json", self.summary)

    def plot(self, output_dir: str | os.PathLike):
        """Draw curves.png, whole or not at all."""
        with staged(output_dir) as staging:
            self._plot(staging / "curves.png")

    def __str__(self) -> str:
        heads = ["domain", "requests", "alpha before", "after", "first fifth", "last fifth", "identical", "near-ties"]
        heads += ["mismatches", "speedup decode", "end to end"]
        names = ["requests", "alpha_before", "alpha_after", "alpha_first_fifth", "alpha_last_fifth", "identical_share"]
        names += ["near_ties", "mismatches", "speedup_decode", "speedup_end_to_end"]
        lines = [heads]
        for domain, figures in self.summary["domains"].items():
            lines.append([shown(domain), *(cell(figures[name]) for name in names)])
        return aligned(lines)

    def _domain(self, name: str) -> dict:
        rows = [row for row in self.log.rows if row["domain"] == name]
        pairs = [pair for pair in self.log.pairs if pair["domain"] == name]
        alphas = [row["alpha"] for row in rows]
        fifth = max(len(rows) // 5, 1)
        verdicts = [pair["verdict"] for pair in pairs]
        plain = sum(pair["plain_seconds"] for pair in pairs)
        decode = sum(pair["decode_seconds"] for pair in pairs)
        # All requests of a domain benefit from learning, so each pair is charged an equal share of it.
        learn = sum(row["learn_seconds"] for row in rows) / len(rows) * len(pairs) if rows else 0.0
        return {
            "requests": len(rows),
            "alpha_before": self.log.before.get(name),
            "alpha_after": self.log.after.get(name),
            "alpha_first_fifth": mean(alphas[:fifth]),
            "alpha_last_fifth": mean(alphas[-fifth:]),
            "compared": len(pairs),
            "identical_share": ratio(verdicts.count("identical"), len(pairs)),
            "near_ties": verdicts.count("near_tie"),
            "mismatches": verdicts.count("mismatch"),
            "speedup_decode": ratio(plain, decode),
            "speedup_end_to_end": ratio(plain, decode + learn),
        }

    def _plot(self, path: Path):
        from matplotlib.figure import Figure

        rows, window = self.log.rows, max(len(self.log.rows) // 12, 5)
        figure = Figure(figsize=(9, 6), layout="constrained")
        alpha, speed = figure.subplots(2, 1, sharex=True)
        served = [row["request"] for row in rows]
        alpha.plot(served, [row["alpha"] for row in rows], ".", color="C0", alpha=0.3, label="a request")
        smooth = [mean([r["alpha"] for r in rows[max(i - window + 1, 0) : i + 1]]) for i in range(len(rows))]
        alpha.plot(served, smooth, color="C0", label=f"mean of {window}")
        alpha.set_ylabel("α")
        alpha.set_ylim(0, 1)
        speedups = [pair["plain_seconds"] / pair["decode_seconds"] for pair in self.log.pairs]
        speed.plot([pair["request"] for pair in self.log.pairs], speedups, ".-", color="C1", label="speedup_decode")
        speed.axhline(1, color="grey", linewidth=0.8)
        speed.set_ylabel("speed-up over plain")
        speed.set_xlabel("requests served")
        shifts = [row["request"] for before, row in pairwise(rows) if before["domain"] != row["domain"]]
        for axis in (alpha, speed):
            for shift in shifts:
                axis.axvline(shift - 0.5, color="black", linestyle="--", linewidth=0.8)
            axis.legend(loc="lower right")  # the domains' names are at the upper edge
        for start in [0, *shifts] if rows else []:
            name = shown(rows[start]["domain"])
            # Literally: matplotlib would take a $ for mathematics.
            plain = {"parse_math": False, "usetex": False}
            alpha.annotate(
                name, (start, 0.98), va="top", ha="left", xytext=(4, 0), textcoords="offset points", **plain
            )
        figure.savefig(path, dpi=110)


def overall_of(log: RunLog, assistant: OnlineAssistant, target: PreTrainedModel, args: ModelArguments) -> dict:
    """Collect the figures and settings of the whole run, for `summary.json`."""
    stats = assistant.stats
    return {
        "target_forwards": log.target_forwards,
        "rounds": sum(row["rounds"] for row in log.rows),
        "updates": stats.updates,
        "failed_updates": stats.failed_updates,
        "rejected_updates": stats.rejected_updates,
        "accepted_updates": stats.accepted_updates,
        "regret_vs_static": stats.regret_vs_static,
        "learning_rate": stats.learning_rate,
        "learned_tokens": stats.learned_tokens,
        "learning_seconds": stats.learning_seconds,
        "longest_update_s": stats.longest_update,
        "wall_s": log.wall,
        "seed": assistant.osd_config.seed,
        **setting_of(target),
        "arguments": asdict(args),
    }


def setting_of(target: PreTrainedModel) -> dict:
    """Say in which dtype, with how many threads and on which kind of device a run decoded."""
    return {
        "dtype": str(target.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "device": str(target.device.type),
    }
