"""`RunLog`: a row for each request in a JSONL file, and the checkpoint a run is resumed from. No prompt is written."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from hf_osd import OnlineConfig
from hf_osd.metrics.stats import Stats
from hf_osd.saving.state import saved_progress
from hf_osd.system.files import discard_states, states
from hf_osd.system.strict_json import dumps
from recipes.common.figures import mean, or_none, ratio
from recipes.common.run_folder import CHECKPOINT

logger = logging.getLogger("hf_osd.recipes.run_log")

METRICS = "metrics.jsonl"


class RunLog:
    """The rows of a run, the requests that were also decoded plainly and by the suffix cache alone (`pairs`), and α on held-back prompts before and after, by step.

    Rows are appended to their file as they come, and a checkpoint remembers how many there were. A run that was killed goes on from its checkpoint:
    later rows are dropped, and their requests served again. Nothing is touched before `begin`.

    Args:
        output_dir: folder of the rows and of checkpoint/.
        identity (`dict`): settings, and digests of what they name, that must be the same for a run to be resumed.
        resume (`bool`): go on from the checkpoint; without one, start afresh.
        name (`str`): name of the file of rows.

    Raises:
        ValueError: if the checkpoint belongs to another run or is damaged, or rows it counts are missing from the file.
        OSError: if the directory cannot be written.
    """

    def __init__(self, output_dir: str | os.PathLike, identity: dict, resume: bool = False, name: str = METRICS):
        self._file = Path(output_dir) / name
        self.directory, self.identity = Path(output_dir), json.loads(json.dumps(identity))
        self.rows: list[dict] = []
        self.pairs: list[dict] = []
        self.before: dict[str, list[float | None] | None] = {}
        self.after: dict[str, list[float | None] | None] = {}
        self.target_forwards = 0
        self.wall_before = 0.0  # seconds spent before the run was resumed
        self._started = time.perf_counter()
        self._written, self._bytes = 0, 0  # rows in the file, and its length with them
        self.resumed = resume and bool(states(self.checkpoint))
        if self.resumed:
            self._load()

    def begin(self) -> RunLog:
        """Make rows and checkpoints of the folder this run's: remove an older run's, or, if resumed, the rows after the checkpoint."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            discard_states(self.checkpoint)  # or they would pass for this run's
        self._write()
        return self

    @property
    def checkpoint(self) -> Path:
        return self.directory / CHECKPOINT

    @property
    def served(self) -> int:
        return len(self.rows)

    @property
    def wall(self) -> float:
        """Seconds the run has taken, including those before it was resumed."""
        return self.wall_before + time.perf_counter() - self._started

    def add(self, domain: str, stats: Stats, figures: dict) -> dict:
        """Log a request that was served; returns its row, to which `figures` are added."""
        call = stats.last
        row = {
            "request": self.served,
            "domain": domain,
            "new_tokens": call.new_tokens,
            "rounds": call.rounds,
            "drafted": call.drafted,
            "accepted": call.accepted,
            "accepted_from_draft": call.accepted_by["draft"],
            "tested": call.tested,
            "alpha": or_none(call.alpha),
            "alpha_live": or_none(call.alpha_live),
            **figures,
            "updates": stats.updates,
        }
        self.rows.append(row)
        try:
            self._write()
        except OSError as error:  # a full disk, for instance: the row stays in memory and is written with a later one
            logger.error("Row %d waits: cannot write to %s (%s).", row["request"], self._file, error.strerror)
        return row

    def add_pair(self, domain: str, verdict: str, plain_seconds: float, decode_seconds: float, **further: float):
        """Log that the request just served was also decoded plainly, with the verdict of the comparison.

        Args:
            **further: how it was decoded by the suffix cache alone, if it was: `new_tokens`, those of the answer that was served; `cache_tokens` and `cache_seconds`.
        """
        pair = {"request": self.served - 1, "domain": domain, "verdict": verdict}
        self.pairs.append(pair | {"plain_seconds": plain_seconds, "decode_seconds": decode_seconds} | further)

    def recent(self, count: int) -> dict[str, float | None]:
        """Compute figures over the last `count` requests; `None` for those that are unknown, such as α where nothing was drafted."""
        rows = self.rows[-count:]
        seconds = sum(row["decode_seconds"] for row in rows)
        tokens = sum(row["new_tokens"] for row in rows)
        return {
            "alpha": mean([row["alpha"] for row in rows]),
            "tokens_per_round": ratio(tokens, sum(row["rounds"] for row in rows)),
            "tokens_per_second": ratio(tokens, seconds),
        }

    def save(self, assistant, with_buffer: bool = False):
        """Write a checkpoint: learner, statistics and progress of one moment and, with `with_buffer`, the feedback.

        Raises:
            OSError: if it cannot be written; earlier checkpoints are then unchanged.
        """
        self._write(through=True)  # before the state, which counts these rows
        known = {name: getattr(self, name) for name in ("identity", "pairs", "before", "target_forwards", "wall")}
        assistant.save_state(
            self.checkpoint, with_buffer, progress=known | {"rows": self._written, "bytes": self._bytes}
        )

    def try_to_save(self, assistant, with_buffer: bool = False) -> bool:
        """Write a checkpoint while serving goes on; a failure is logged. Returns whether it was written."""
        try:
            self.save(assistant, with_buffer)
        except (OSError, RuntimeError) as error:  # RuntimeError: a learner that has died has no state
            logger.error("No checkpoint after %d requests; serving goes on. %s", self.served, error)
            return False
        return True

    def _write(self, through: bool = False):
        """Append rows that are not in the file yet, in place of anything else after those that are: half a row, or rows of a killed run."""
        lines = "".join(dumps(row) + "\n" for row in self.rows[self._written :]).encode()
        with self._file.open("r+b" if self._file.exists() else "wb") as file:
            file.truncate(self._bytes)
            file.seek(self._bytes)
            file.write(lines)
            if through:
                file.flush()
                os.fsync(file.fileno())
        self._written, self._bytes = len(self.rows), self._bytes + len(lines)

    def _load(self):
        progress = saved_progress(self.checkpoint)
        try:  # it may have begun with fields that were removed since
            OnlineConfig.from_dict(progress["identity"].get("config", {}))
        except ValueError as error:
            raise ValueError(
                f"The run in {self.directory} cannot go on as it began: {error} Start anew in its place with --overwrite, or choose another --output_dir."
            ) from error
        if changed := _changed(progress["identity"], self.identity):
            held_back = (
                " Prompts that have been learnt may now be held back to score on."
                if "held_back_prompts" in changed
                else ""
            )
            raise ValueError(
                f"The run in {self.directory} began with another {', '.join(changed)} than --resume finds now.{held_back} Go on with what it began with, "
                "start anew in its place with --overwrite, or choose another --output_dir."
            )
        for name in ("pairs", "before", "target_forwards"):
            setattr(self, name, progress[name])
        # A run of an older version knows α alone.
        self.before = {name: [one] if isinstance(one, float) else one for name, one in self.before.items()}
        self.wall_before = progress["wall"]
        self._written, self._bytes = progress["rows"], progress["bytes"]
        try:
            with self._file.open("rb") as file:
                self.rows = [json.loads(line) for line in file.read(self._bytes).splitlines()]
        except (OSError, ValueError) as error:
            reason = error
        else:
            reason = f"it has {len(self.rows)}" if len(self.rows) != self._written else None
        if reason is not None:
            raise ValueError(
                f"{self._file} lacks rows of the {self._written} that the checkpoint in {self.checkpoint} counts ({reason}); restore the "
                "file, or start anew with --overwrite."
            )


def _changed(saved: dict, now: dict) -> list[str]:
    """List the names of settings that differ; those within `config` have no prefix, like flags."""
    names = []
    for name, value in now.items():
        was = saved.get(name)
        if isinstance(value, dict) and isinstance(was, dict):
            names += _changed(was, value)
        elif was != value:
            names.append(name)
    return names
