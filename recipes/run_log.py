"""What a run has seen: one row a request in a JSONL file, and the checkpoint it can be resumed from. No prompt is written."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

from hf_osd.checkpoint import staged
from hf_osd.stats import Stats

METRICS, PROGRESS = "metrics.jsonl", "progress.json"


class RunLog:
    """The rows of a run, its plain-decoding pairs, and its held-back α.

    Args:
        output_dir: where the rows and checkpoint/ lie.
        identity (`dict`): the settings that a resumed run must share.
        resume (`bool`): go on from the checkpoint; without one, start afresh.
        name (`str`): of the file of rows.

    Raises:
        ValueError: if the checkpoint is of another run.
        OSError: if the directory cannot be written.
    """

    def __init__(self, output_dir: str | os.PathLike, identity: dict, resume: bool = False, name: str = METRICS):
        self._file = Path(output_dir) / name
        self.directory, self.identity = Path(output_dir), json.loads(json.dumps(identity))
        self.rows: list[dict] = []
        self.pairs: list[dict] = []
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.target_forwards = 0
        self.wall_before = 0.0  # seconds spent before the run was resumed
        self._started = time.perf_counter()
        self.directory.mkdir(parents=True, exist_ok=True)
        if resume and (self.checkpoint / PROGRESS).is_file():
            self._load()
        else:
            (self.checkpoint / PROGRESS).unlink(missing_ok=True)  # of an older run, not to be taken for this one's
        with self._file.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint"

    @property
    def served(self) -> int:
        return len(self.rows)

    @property
    def wall(self) -> float:
        """Seconds the run has taken, those before it was resumed included."""
        return self.wall_before + time.perf_counter() - self._started

    def add(self, domain: str, stats: Stats, figures: dict) -> dict:
        """One request served; its row, with `figures` in it."""
        call = stats.last
        row = {
            "request": self.served,
            "domain": domain,
            "new_tokens": call.new_tokens,
            "rounds": call.rounds,
            "drafted": call.drafted,
            "accepted": call.accepted,
            "tested": call.tested,
            "alpha": or_none(call.alpha),
            "alpha_live": or_none(call.alpha_live),
            **figures,
            "updates": stats.updates,
        }
        self.rows.append(row)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def add_pair(self, domain: str, verdict: str, plain_seconds: float, decode_seconds: float):
        """The request just served, decoded plainly too."""
        pair = {"request": self.served - 1, "domain": domain, "verdict": verdict}
        self.pairs.append(pair | {"plain_seconds": plain_seconds, "decode_seconds": decode_seconds})

    def recent(self, count: int) -> dict[str, float]:
        """Figures over the last `count` requests."""
        rows = self.rows[-count:]
        seconds = sum(row["decode_seconds"] for row in rows)
        tokens = sum(row["new_tokens"] for row in rows)
        return {
            "alpha": mean([row["alpha"] for row in rows]),
            "tokens_per_round": tokens / sum(row["rounds"] for row in rows),
            "tokens_per_second": tokens / seconds,
        }

    def save(self, assistant):
        """Checkpoint: the learner and how far the stream is."""
        progress = {name: getattr(self, name) for name in ("identity", "rows", "pairs", "before", "target_forwards")}
        with staged(self.checkpoint) as staging:  # both at once: the rows are those that the learner has learnt
            assistant.save_state(staging)
            (staging / PROGRESS).write_text(json.dumps(progress | {"wall": self.wall}), encoding="utf-8")

    def _load(self):
        try:
            progress = json.loads((self.checkpoint / PROGRESS).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.checkpoint / PROGRESS} is damaged ({error}); delete it to start afresh."
            ) from error
        saved = progress["identity"]
        if changed := [name for name, value in self.identity.items() if saved.get(name) != value]:
            raise ValueError(
                f"The checkpoint in {self.checkpoint} was made with other settings of {', '.join(changed)}; resume with the "
                "same ones, or choose another --output_dir."
            )
        for name in ("rows", "pairs", "before", "target_forwards"):
            setattr(self, name, progress[name])
        self.wall_before = progress["wall"]


class Tracking:
    """Transformers' own reporting integrations (trackio, tensorboard, wandb, …), fed with the run's figures.

    Args:
        report_to (`str`): as in `TrainingArguments`, or `"none"`.
        output_dir: what the integrations take for the run's folder, and name it after.
        model: the draft, whose config they note.
    """

    def __init__(self, report_to: str, output_dir: str | os.PathLike, model):
        self._callbacks = []
        if report_to == "none":
            return
        from transformers import TrainerControl, TrainerState, TrainingArguments, integrations

        name = Path(output_dir).resolve().name
        args = TrainingArguments(output_dir=str(output_dir), report_to=report_to, project="hf_osd", run_name=name)
        self._event = (args, TrainerState(is_world_process_zero=True), TrainerControl())
        self._model = model
        self._callbacks = [kind() for kind in integrations.get_reporting_integration_callbacks(args.report_to)]
        for callback in self._callbacks:
            callback.on_train_begin(*self._event, model=model)

    def log(self, served: int, figures: dict[str, float]):
        """Figures at a number of requests served, the integrations' global step."""
        for callback in self._callbacks:
            self._event[1].global_step = served
            callback.on_log(*self._event, model=self._model, logs=dict(figures))

    def end(self):
        for callback in self._callbacks:
            callback.on_train_end(*self._event, model=self._model)


def mean(values: list[float | None]) -> float:
    """The mean of what is known; NaN of nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def or_none(value: float) -> float | None:
    """What JSON can hold: nothing in place of NaN."""
    return None if math.isnan(value) else value
