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
from recipes.common.figures import aligned, cell, fifths, mean, rate_interval, rate_ratio, ratio, shown
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
        learnt = {
            "requests": "requests",
            "alpha before": "alpha_before",
            "after": "alpha_after",
            "after, by step": "alpha_by_step",
            "first fifth": "alpha_first_fifth",
            "last fifth": "alpha_last_fifth",
            "accepted from draft, by fifths": "share_from_draft_by_fifth",
        }
        served = {
            "compared": "compared",
            "identical": "identical_share",
            "near-ties": "near_ties",
            "mismatches": "mismatches",
            "speedup decode": "speedup_decode",
            "end to end": "speedup_end_to_end",
            "gain of learning": "gain_of_learning",
            "95% interval": "gain_of_learning_interval",
            "gain end to end": "gain_of_learning_end_to_end",
        }
        return f"{self._table(learnt)}\n\n{self._table(served)}"

    def _table(self, columns: dict[str, str]) -> str:
        """Lay out figures with a line for each domain; `columns` has their names by head."""
        lines = [["domain", *columns]]
        for domain, figures in self.summary["domains"].items():
            lines.append([shown(domain), *(cell(figures[name]) for name in columns.values())])
        return aligned(lines)

    def _domain(self, name: str) -> dict:
        rows = [row for row in self.log.rows if row["domain"] == name]
        pairs = [pair for pair in self.log.pairs if pair["domain"] == name]
        alphas = [[row["alpha"] for row in part] for part in fifths(rows)]
        before, after = (scores.get(name) or [None] for scores in (self.log.before, self.log.after))
        verdicts = [pair["verdict"] for pair in pairs]
        plain = sum(pair["plain_seconds"] for pair in pairs)
        decode = sum(pair["decode_seconds"] for pair in pairs)
        # All requests of a domain benefit from learning, so each pair is charged an equal share of it.
        learn = mean([row["learn_seconds"] for row in rows]) or 0.0
        beside_cache = [
            (pair["new_tokens"], pair["decode_seconds"], pair["cache_tokens"], pair["cache_seconds"])
            for pair in pairs
            if "cache_seconds" in pair
        ]
        return {
            "requests": len(rows),
            "alpha_before": before[0],
            "alpha_after": after[0],
            "alpha_by_step_before": before,
            "alpha_by_step": after,
            "alpha_first_fifth": mean(alphas[0]),
            "alpha_last_fifth": mean(alphas[-1]),
            "share_from_draft": share_from_draft(rows),
            "share_from_draft_by_fifth": [share_from_draft(part) for part in fifths(rows)],
            "learn_seconds": sum(row["learn_seconds"] for row in rows),
            "compared": len(pairs),
            "identical_share": ratio(verdicts.count("identical"), len(pairs)),
            "near_ties": verdicts.count("near_tie"),
            "mismatches": verdicts.count("mismatch"),
            "speedup_decode": ratio(plain, decode),
            "speedup_end_to_end": ratio(plain, decode + learn * len(pairs)),
            "gain_of_learning": rate_ratio(beside_cache),
            "gain_of_learning_interval": rate_interval(beside_cache),
            "gain_of_learning_end_to_end": rate_ratio(beside_cache, learn),
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


def share_from_draft(rows: list[dict]) -> float | None:
    """Divide the accepted tokens that the draft proposed by all accepted ones; `None` where none was accepted, or a row is of a run that did not count it."""
    counts = [row.get("accepted_from_draft") for row in rows]
    return None if None in counts else ratio(sum(counts), sum(row["accepted"] for row in rows))


def overall_of(log: RunLog, assistant: OnlineAssistant, target: PreTrainedModel, args: ModelArguments) -> dict:
    """Collect the figures and settings of the whole run, for `summary.json`."""
    stats = assistant.stats
    return {
        "target_forwards": log.target_forwards,
        "rounds": sum(row["rounds"] for row in log.rows),
        "acceptance_by_position": stats.total.to_dict()["acceptance_by_position"],
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
