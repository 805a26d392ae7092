"""Lays out the outcome of the paper's experiments as the paper does, its figures beside those measured: one Markdown file, and plots where there is matplotlib.

    python -m recipes.experiments.paper.report --runs runs/paper --output_dir runs/paper/report

It reads what the other recipes write: the JSONL logs of replay.py, `summary.json` of distill.py, and the JSON of top_tokens.py and costs.py.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from hf_osd import OnlineConfig
from hf_osd.system.bounds import check_options, option, switch
from hf_osd.system.files import staged
from recipes.common.command import run_command
from recipes.common.figures import cell, markdown, shown
from recipes.common.options import string
from recipes.experiments.arms import intervals
from recipes.experiments.paper import published as paper
from recipes.experiments.paper.outcome import Group, Outcome
from recipes.experiments.paper.plots import draw

logger = logging.getLogger("hf_osd.recipes.report")

POINTS = (250, 500)  # requests at which the paper's curves were read, beside the last point of a run


@dataclass
class ReportArguments:
    """What to report. Of `OnlineConfig` nothing matters here."""

    runs: str = option(
        "runs/paper",
        string(),
        "Folders and files with ',' between; of a folder all .jsonl and .json in it, and the summary.json of its folders.",
    )
    output_dir: str = option("runs/paper/report", string(), "Folder for report.md and the plots.")
    machine: str = option("", string(), "The machine that the runs were made on, for the table of what differs.")
    plots: bool = option(True, switch(), "Draw plots too; they need matplotlib.")

    def __post_init__(self):
        check_options(self)


def main(argv: list[str] | None = None) -> int:
    """Write the report; returns the exit status."""
    return run_command(ReportArguments, write, argv)


def write(args: ReportArguments, config: OnlineConfig):
    """Read the runs, and write `report.md` and the plots."""
    outcome = Outcome.read(args.runs)
    drawing = args.plots and find_spec("matplotlib") is not None
    if args.plots and not drawing:
        logger.warning(
            "The plots are left out, for matplotlib is not installed; it comes with `pip install hf-osd[demo]`."
        )
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    with staged(args.output_dir) as staging:
        plots = draw(outcome.groups, staging) if drawing else []
        text = report(outcome, args.machine, plots)
        (staging / "report.md").write_text(text, encoding="utf-8")
    print(text)


def report(outcome: Outcome, machine: str = "", plots: list[str] = ()) -> str:
    """Write the report as Markdown."""
    parts = [
        ("What differs", _differs(outcome, machine)),
        ("Online, by domain (table 1, figure 3)", _domains(outcome.groups)),
        ("Offline distillation (table 1)", _offline(outcome.groups)),
        ("Shifts (figures 4, 5 and 11)", _shifts(outcome.groups)),
        ("Mixture (figure 9)", _mixtures(outcome.groups)),
        ("The most frequent tokens (figure 7)", _tokens(outcome.tokens)),
        ("Encoder-decoders (table 1)", _summaries(outcome.summaries)),
        ("Costs (table 5)", _costs(outcome.costs)),
    ]
    text = [f"## {head}\n\n{body}" for head, body in parts if body]
    text += ["\n".join(f"![{name}]({name})" for name in plots)] if plots else []
    return "# The paper's experiments\n\n" + "\n\n".join(text) + "\n"


def _differs(outcome: Outcome, machine: str) -> str:
    rows = [row for group in outcome.groups for row in group.rows]
    rows += [summary["overall"].get("arguments", {}) for summary in outcome.summaries.values()]

    def all_of(key: str) -> str:
        return ", ".join(sorted({str(row[key]) for row in rows if row.get(key) is not None})) or "-"

    ours = {
        "target": all_of("target"),
        "draft": all_of("draft"),
        "machine": machine or "-",
        "dtype": all_of("dtype"),
        "new tokens at most": all_of("max_new_tokens"),
        "k, update interval": "5, 8, unless an arm names others",
        "α is": "over held-back prompts, all positions of the target's answers",
    }
    return markdown(
        [["", "the paper", "here"], *([name, theirs, ours[name]] for name, theirs in paper.SETTING.items())]
    )


def _domains(groups: list[Group]) -> str:
    heads = [
        "stream",
        "answers",
        "draft: arm",
        "requests",
        "seeds",
        "static α",
        "α after",
        "gain (95%)",
        "the paper's static → after",
        "its gain",
        "log",
    ]
    lines = []
    for group in sorted((g for g in groups if g.kind == "domain"), key=lambda g: (g.rows[0]["traces"], g.log)):
        [stream] = group.rows[0]["traces"]
        theirs, points = paper.published(stream), group.points(stream)
        for point in sorted({*POINTS, points[-1]} & {*points} - {0}):
            gain = intervals(group.hits(stream, 0), group.hits(stream, point))
            known = theirs is not None and theirs.gain(point) is not None
            lines.append(
                [
                    shown(stream), _answers(group), group.label, point, group.seeds, cell(group.alpha(stream, 0)), cell(group.alpha(stream, point)), gain,
                    f"{theirs.static:.2f} → {theirs.online[point]:.2f}" if known else "-", f"{theirs.gain(point):+.2f}" if known else "-", group.log,
                ]
            )  # fmt: skip
    return markdown([heads, *lines]) if lines else ""


def _answers(group: Group) -> str:
    temperature = group.rows[0].get("temperature", 0)
    return f"sampled at {temperature:g}" if temperature else "greedy"


def _offline(groups: list[Group]) -> str:
    heads = [
        "stream",
        "draft: arm",
        "requests × passes",
        "seeds",
        "α before",
        "α after",
        "gain (95%)",
        "the paper's",
        "log",
    ]
    lines = []
    for group in (g for g in groups if g.kind == "offline"):
        row, [stream] = group.rows[0], group.rows[0]["traces"]
        last, theirs = group.points(stream)[-1], paper.published(stream)
        gain = intervals(group.hits(stream, 0), group.hits(stream, last))
        known = "-" if theirs is None else f"{theirs.offline[0]:.2f} → {theirs.offline[1]:.2f}"
        scale = f"{sum(row['requests'])} × {row['passes']}"
        alphas = [cell(group.alpha(stream, point)) for point in (0, last)]
        lines.append([shown(stream), group.label, scale, group.seeds, *alphas, gain, known, group.log])
    return markdown([heads, *lines]) if lines else ""


def _shifts(groups: list[Group]) -> str:
    """Write a table for each run: α of each stream before its turn, within it, at its end and at the end of all; in a sharp shift also against a draft of the mixture."""
    mixtures, texts = [g for g in groups if g.kind == "mixture"], []
    for group in (g for g in groups if g.kind in ("shift", "languages", "gradual")):
        row = group.rows[0]
        ends = list(accumulate(row["requests"]))
        heads = [
            "stream",
            "requests",
            "α at the begin",
            "before its turn",
            "after n of its requests",
            "at the end of all",
            "less α of the mixture, at the end of its turn (95%)",
            "the paper's",
        ]
        lines = []
        for name, count, end in zip(row["traces"], row["requests"], ends, strict=True):
            points, begin = group.points(name), end - count
            turn = [point for point in points if begin < point <= end]
            within = (
                "-"
                if group.kind == "gradual"
                else ", ".join(f"{point - begin}: {group.alpha(name, point):.3f}" for point in turn)
            )
            before = cell(group.alpha(name, begin)) if begin in points and group.kind != "gradual" else "-"
            ends_of = [cell(group.alpha(name, point)) for point in (0, points[-1])]
            lines.append(
                [
                    shown(name),
                    count,
                    ends_of[0],
                    before,
                    within,
                    ends_of[1],
                    _against(group, name, end, mixtures),
                    _of_shift(group.kind, name),
                ]
            )
        texts.append(
            f"{group.log}, {_answers(group)}, {group.label}, seeds {group.seeds}\n\n{markdown([heads, *lines])}"
        )
    return "\n\n".join(texts)


def _of_shift(kind: str, stream: str) -> str:
    if kind == "languages":
        return paper.LANGUAGES
    theirs = paper.published(stream)
    return "-" if theirs is None else paper.GRADUAL if kind == "gradual" else theirs.shift


def _against(group: Group, stream: str, point: int, mixtures: list[Group]) -> str:
    """Compare α after `point` requests with that of the first mixture whose draft was scored on the same prompts by as many seeds; `-` if there is none."""
    if group.kind == "gradual" or point not in group.points(stream):
        return "-"
    for other in mixtures:
        if stream not in other.rows[0]["scores"] or len(other.rows) != len(group.rows):
            continue
        static, now = other.hits(stream, other.points(stream)[-1]), group.hits(stream, point)
        if [[n for _, n in one] for one in static] == [[n for _, n in one] for one in now]:
            return f"{intervals(static, now)}, {sum(other.rows[0]['requests'])} requests mixed"
    return "-"


def _mixtures(groups: list[Group]) -> str:
    heads, lines = ["stream", "draft: arm", "requests in all", "seeds", "α before", "α after", "gain (95%)", "log"], []
    for group in (g for g in groups if g.kind == "mixture"):
        for name in group.rows[0]["scores"]:
            last = group.points(name)[-1]
            gain = intervals(group.hits(name, 0), group.hits(name, last))
            lines.append(
                [
                    shown(name),
                    group.label,
                    last,
                    group.seeds,
                    cell(group.alpha(name, 0)),
                    cell(group.alpha(name, last)),
                    gain,
                    group.log,
                ]
            )
    return f"{markdown([heads, *lines])}\n\nThe paper: {paper.MIXTURE}." if lines else ""


def _tokens(tokens: dict[str, dict]) -> str:
    lines = [
        [
            shown(found["trace"]),
            one["draft"],
            found["top"],
            *(cell(one[key]) for key in ("precision", "recall", "alpha")),
            name,
        ]
        for name, found in tokens.items()
        for one in found["drafts"]
    ]
    return markdown([["stream", "draft", "tokens", "precision", "recall", "α", "file"], *lines]) if lines else ""


def _summaries(summaries: dict[str, dict]) -> str:
    lines = []
    for name, summary in summaries.items():
        seed = summary["overall"].get("seed")
        for stream, figures in summary["domains"].items():
            before, after = figures["alpha_before"], figures["alpha_after"]
            gain = "-" if None in (before, after) else f"{after - before:+.3f}"
            served = [cell(figures[key]) for key in ("speedup_decode", "speedup_end_to_end")]
            verdicts = ", ".join(str(figures[key]) for key in ("compared", "near_ties", "mismatches"))
            lines.append(
                [
                    shown(stream),
                    figures["requests"],
                    cell(seed),
                    cell(before),
                    cell(after),
                    gain,
                    *served,
                    verdicts,
                    paper.T5,
                    name,
                ]
            )
    heads = [
        "stream",
        "requests",
        "seed",
        "α before",
        "α after",
        "gain",
        "speedup_decode",
        "end to end",
        "compared, near-ties, mismatches",
        "the paper's",
        "run",
    ]
    return markdown([heads, *lines]) if lines else ""


def _costs(costs: dict[str, dict]) -> str:
    names = list(dict.fromkeys(key for found in costs.values() for key in found))
    lines = [[key, *(_number(found.get(key)) for found in costs.values())] for key in names]
    return markdown([["of one request", *costs], *lines]) if costs else ""


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
