"""`draw`: the plots of the report, laid out as the paper's figures 3 and 4, its points beside the curves measured."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.common.figures import shown
from recipes.experiments.paper.published import published

if TYPE_CHECKING:
    from recipes.experiments.paper.outcome import Group

_LITERALLY = {"parse_math": False}  # matplotlib would take a $ for mathematics


def draw(groups: list[Group], folder: Path) -> list[str]:
    """Draw what there is to draw into a folder, and return the files' names."""
    names = []
    if domains := [group for group in groups if group.kind == "domain"]:
        names.append("domains.png")
        _draw_domains(domains, folder / names[-1])
    for group in groups:
        if group.kind in ("shift", "gradual", "languages"):
            names.append(f"{group.kind}-{len(names)}.png")
            _draw_shift(group, folder / names[-1])
    return names


def _draw_domains(groups: list[Group], path: Path):
    """Draw a panel for each stream: α over requests, a curve for each arm, and the paper's points."""
    from matplotlib.figure import Figure

    streams = list(dict.fromkeys(group.rows[0]["traces"][0] for group in groups))
    figure = Figure(figsize=(4.5 * len(streams), 4), layout="constrained")
    for axis, stream in zip(figure.subplots(1, len(streams), squeeze=False, sharey=True)[0], streams, strict=True):
        for group in groups:
            if group.rows[0]["traces"] == [stream]:
                points = group.points(stream)
                label = f"{group.log}: {group.rows[0]['arm'].partition(',memory_budget')[0]}"
                axis.plot(points, [group.alpha(stream, point) for point in points], ".-", label=shown(label))
        if (theirs := published(stream)) is not None:
            last = max(group.points(stream)[-1] for group in groups if group.rows[0]["traces"] == [stream])
            online = {point: alpha for point, alpha in theirs.online.items() if point <= last}
            axis.plot(list(online), list(online.values()), "kx", label="the paper's, online")
            axis.axhline(theirs.static, color="black", linestyle=":", linewidth=0.8, label="the paper's, static")
        axis.set_title(shown(stream), **_LITERALLY)
        axis.set_xlabel("requests")
        axis.set_ylim(0, 1)
        _legend(axis)
    figure.savefig(path, dpi=110)


def _draw_shift(group: Group, path: Path):
    """Draw α of all streams over one run, a dashed line where the next one begins."""
    from matplotlib.figure import Figure

    row = group.rows[0]
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    for name in row["traces"]:
        points = group.points(name)
        axis.plot(points, [group.alpha(name, point) for point in points], ".-", label=shown(name))
    if group.kind != "gradual":
        for end in list(accumulate(row["requests"]))[:-1]:
            axis.axvline(end, color="black", linestyle="--", linewidth=0.8)
    axis.set_title(shown(group.log), **_LITERALLY)
    axis.set_xlabel("requests")
    axis.set_ylabel("α")
    axis.set_ylim(0, 1)
    _legend(axis)
    figure.savefig(path, dpi=110)


def _legend(axis):
    for text in axis.legend(loc="lower right", fontsize=7).get_texts():
        text.set_parse_math(False)
