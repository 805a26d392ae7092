"""`Outcome`: what the experiments have written, read from their logs and figures, runs grouped by arm and named by the kind of experiment."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from recipes.common.row_log import RowLog
from recipes.experiments.replay import alpha_of


@dataclass
class Group:
    """The runs of one arm in one log, a row for each seed."""

    log: str
    rows: list[dict]

    @property
    def kind(self) -> str:
        """Name the experiment: `domain`, `offline`, `languages`, `mixture`, `gradual` or `shift`."""
        row = self.rows[0]
        if len(row["traces"]) == 1:
            return "offline" if row.get("passes", 1) > 1 else "domain"
        if row.get("mixed"):
            return "mixture"
        if row.get("gradual"):
            return "gradual"
        return "languages" if all(name.startswith("lang") for name in row["traces"]) else "shift"

    @property
    def label(self) -> str:
        """Name draft and arm, as far as the log knows them."""
        return f"{self.rows[0].get('draft', '-')}: {self.rows[0]['arm']}"

    @property
    def seeds(self) -> str:
        return ", ".join(str(row["seed"]) for row in self.rows)

    def points(self, stream: str) -> list[int]:
        """List the requests after which α of a stream was measured."""
        return sorted(map(int, self.rows[0]["scores"][stream]))

    def hits(self, stream: str, point: int) -> list[list[list[float]]]:
        """Return, for each seed, `[accepted, positions]` of each held-back prompt."""
        return [row["scores"][stream][str(point)] for row in self.rows]

    def alpha(self, stream: str, point: int) -> float:
        return fmean(map(alpha_of, self.hits(stream, point)))


@dataclass
class Outcome:
    """All that was read: runs of replay.py, and by file the summaries of distill.py and the figures of top_tokens.py and costs.py."""

    groups: list[Group]
    summaries: dict[str, dict]
    tokens: dict[str, dict]
    costs: dict[str, dict]

    @classmethod
    def read(cls, runs: str) -> Outcome:
        """Read files and folders.

        Raises:
            ValueError: if a file is none of these, or there is none at all.
            OSError: if a file cannot be read.
        """
        found = cls([], {}, {}, {})
        for path in _files(runs):
            if path.suffix == ".jsonl":
                found._add_rows(path)
            else:
                found._add_figures(path)
        if not any((found.groups, found.summaries, found.tokens, found.costs)):
            raise ValueError(
                f"`runs` is {runs!r}, where there is no outcome; name the folder into which the experiments wrote."
            )
        return found

    def _add_rows(self, path: Path):
        by_arm: dict[tuple, list[dict]] = {}
        for row in RowLog(str(path), ("arm", "seed", "scores", "traces")).rows:
            setting = (row["arm"], row.get("draft"), tuple(row["traces"]), str(row["requests"]), str(row.get("mixed")))
            by_arm.setdefault((*setting, row.get("gradual"), row.get("passes")), []).append(row)
        self.groups += [Group(path.stem, rows) for rows in by_arm.values()]

    def _add_figures(self, path: Path):
        try:
            figures = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}; leave it out of `runs`.") from error
        places = {"domains": self.summaries, "drafts": self.tokens, "learning_flops": self.costs}
        for key, place in places.items():
            if isinstance(figures, dict) and key in figures:
                place[path.parent.name if path.stem == "summary" else path.stem] = figures


def _files(runs: str) -> list[Path]:
    files: list[Path] = []
    for part in filter(None, (part.strip() for part in runs.split(","))):
        path = Path(part)
        if path.is_dir():
            logs = [
                log for log in path.glob("*.jsonl") if not log.name.startswith("metrics")
            ]  # which distill.py writes
            files += sorted([*logs, *path.glob("*.json"), *path.glob("*/summary.json")])
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"`runs` names {path}, and there is no such file or folder.")
    return files
