"""The end of a run: summary.json, curves.png and the table. Figures are named as docs/figures.md has them."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

from run_log import RunLog, mean

from hf_osd.checkpoint import staged


class RunReport:
    """Figures of a [`RunLog`].

    Args:
        log (`RunLog`): the run.
        overall (`dict`): facts of the whole run.
        skipped (`dict[str, int]`), held_back (`dict[str, int]`): prompts a domain that were skipped, and that α before and after is of.
    """

    def __init__(self, log: RunLog, overall: dict, skipped: dict[str, int], held_back: dict[str, int]):
        self.log = log
        domains = {
            name: self._domain(name) | {"held_back": held_back[name], "skipped": skipped[name]} for name in skipped
        }
        self.summary = {"domains": domains, "overall": overall}

    def write(self, output_dir: str | os.PathLike):
        """summary.json and curves.png, whole or not at all."""
        with staged(output_dir) as staging:
            (staging / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n", encoding="utf-8")
            self._plot(staging / "curves.png")

    def __str__(self) -> str:
        heads = ["domain", "requests", "alpha before", "after", "first fifth", "last fifth", "identical", "near-ties"]
        heads += ["mismatches", "speedup decode", "end to end"]
        names = ["requests", "alpha_before", "alpha_after", "alpha_first_fifth", "alpha_last_fifth", "identical_share"]
        names += ["near_ties", "mismatches", "speedup_decode", "speedup_end_to_end"]
        lines = [heads]
        for domain, figures in self.summary["domains"].items():
            lines.append([domain, *(_cell(figures[name]) for name in names)])
        widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
        )

    def _domain(self, name: str) -> dict:
        rows = [row for row in self.log.rows if row["domain"] == name]
        pairs = [pair for pair in self.log.pairs if pair["domain"] == name]
        alphas = [row["alpha"] for row in rows]
        fifth = max(len(rows) // 5, 1)
        verdicts = [pair["verdict"] for pair in pairs]
        plain = sum(pair["plain_seconds"] for pair in pairs)
        decode = sum(pair["decode_seconds"] for pair in pairs)
        # Learning is shared by all requests of the domain, so a pair bears its share.
        learn = sum(row["learn_seconds"] for row in rows) / len(rows) * len(pairs) if rows else 0.0
        return {
            "requests": len(rows),
            "alpha_before": self.log.before.get(name),
            "alpha_after": self.log.after.get(name),
            "alpha_first_fifth": mean(alphas[:fifth]) if rows else None,
            "alpha_last_fifth": mean(alphas[-fifth:]) if rows else None,
            "compared": len(pairs),
            "identical_share": verdicts.count("identical") / len(pairs) if pairs else None,
            "near_ties": verdicts.count("near_tie"),
            "mismatches": verdicts.count("mismatch"),
            "speedup_decode": plain / decode if pairs else None,
            "speedup_end_to_end": plain / (decode + learn) if pairs else None,
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
            axis.legend(loc="lower right")  # the upper edge names the domains
        for start in [0, *shifts] if rows else []:
            alpha.annotate(
                rows[start]["domain"], (start, 0.98), va="top", ha="left", xytext=(4, 0), textcoords="offset points"
            )
        figure.savefig(path, dpi=110)


def _cell(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
