"""The end of a run: summary.json, curves.png and the table. Figures are named as docs/figures.md has them."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from hf_osd.system.files import staged
from hf_osd.system.strict_json import write_json
from recipes.common.run_log import RunLog, mean, or_none, ratio

_LONGEST = 40  # letters of a name in a picture or a table


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
        """summary.json, whole or not at all; what is not known is null in it."""
        write_json(Path(output_dir) / "summary.json", self.summary)

    def plot(self, output_dir: str | os.PathLike):
        """curves.png, likewise."""
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
            "alpha_first_fifth": or_none(mean(alphas[:fifth])),
            "alpha_last_fifth": or_none(mean(alphas[-fifth:])),
            "compared": len(pairs),
            "identical_share": verdicts.count("identical") / len(pairs) if pairs else None,
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
            axis.legend(loc="lower right")  # the upper edge names the domains
        for start in [0, *shifts] if rows else []:
            name = shown(rows[start]["domain"])
            # As it is: it may have a $, which matplotlib takes for mathematics.
            plain = {"parse_math": False, "usetex": False}
            alpha.annotate(
                name, (start, 0.98), va="top", ha="left", xytext=(4, 0), textcoords="offset points", **plain
            )
        figure.savefig(path, dpi=110)


def shown(name: str) -> str:
    """A name that data has, for a line of a table or a picture: on one line, without what no terminal shows, and not too long."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def cell(value: float | int | None) -> str:
    """A figure in a table; a dash where it is not known."""
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.3f}"
