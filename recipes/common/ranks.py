"""`Processes`: the processes of recipes/distill.py: which one serves which requests, and how their logs become one."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_osd.distill.ranks import RankGroup, RanksParted
from hf_osd.remote.roles import JobRoles
from hf_osd.system.files import staged
from hf_osd.system.strict_json import dumps
from recipes.common.run_folder import DRAFT, RunFolder
from recipes.common.run_log import METRICS, RunLog

if TYPE_CHECKING:
    from torch import Tensor

    from hf_osd import OnlineAssistant

logger = logging.getLogger("hf_osd.recipes.ranks")

MODES = ("together", "separate")


class Processes:
    """The processes of a job, as one of them sees them. A single process serves and learns.

    Args:
        mode (`str`): `"together"`: each serves and all learn one draft; `"separate"`: the last one learns for the others.

    Raises:
        ValueError: if `"separate"` has only one process.
    """

    def __init__(self, mode: str):
        from accelerate import Accelerator

        local, beside = (
            int(os.environ.get(name, least)) for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        )
        self.beside = beside  # processes on this machine, this one included
        if mode == "separate" and torch.accelerator.is_available():
            torch.accelerator.set_device_index(local)  # accelerate, which would choose it, sees one process only
        self.roles = JobRoles() if mode == "separate" else None
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.serving = RankGroup.of_job() if self.roles is None else self.roles.serving
        self.several = self.roles is not None or self.serving.size > 1
        self.learns_alone = self.roles is not None and self.roles.learns
        self.first = self.serving.rank == 0 and not self.learns_alone

    def share(self, items: list) -> list:
        """Pick the items that this rank serves."""
        return items[self.serving.rank :: self.serving.size]

    @contextlib.contextmanager
    def folder(self, output_dir: str, resume: bool, overwrite: bool) -> Iterator[RunFolder]:
        """Open the job's output folder, which the first serving rank locks.

        Raises:
            ValueError, OSError: as `RunFolder`; and if several processes are to be resumed.
        """
        if self.several and resume:
            raise ValueError(
                "Several processes cannot be resumed: only the draft they have learnt so far is saved. Start anew with --draft and the path of "
                f"{Path(output_dir) / DRAFT}, in another --output_dir."
            )
        folder = RunFolder(output_dir, resume, overwrite)
        self.serving.sum(1)  # every rank has checked before one writes
        with folder if self.first else contextlib.nullcontext():
            yield folder

    def open_log(self, folder: RunFolder, identity: dict, resume: bool) -> RunLog:
        """Open this rank's log, `metrics.jsonl` if it is alone. Nothing is written yet. Raises `ValueError` as `RunLog` does."""
        name = METRICS.replace(".jsonl", f".rank{self.serving.rank}.jsonl") if self.several else METRICS
        return RunLog(folder.path, identity, resume, name)

    def begin(self, folder: RunFolder, log: RunLog):
        """Clear the folder and begin the log; called by all serving ranks."""
        if self.first:
            folder.clear()
            log.begin()
        self.serving.sum(1)  # the first has made and cleared it
        if not self.first:
            log.begin()

    def merge(self, log: RunLog) -> RunLog:
        """Merge the logs of all serving ranks, stream by stream, and write `metrics.jsonl`, whose rows have a `rank`.

        Called by all serving ranks; only the first one gets the merged log. If a rank is gone, the first one's own log has to do.
        """
        if not self.several:
            return log
        seen = {"rows": log.rows, "pairs": log.pairs, "target_forwards": log.target_forwards}
        try:
            logs = self.serving.gather_json(seen)
        except RanksParted as error:
            logger.error("The figures are of this rank alone. %s", error)
            logs = [seen]
        if not self.first:
            return log
        names = list(dict.fromkeys(row["domain"] for row in log.rows))
        rows = [row | {"rank": rank} for rank, one in enumerate(logs) for row in one["rows"]]
        rows.sort(
            key=lambda row: (names.index(row["domain"]) if row["domain"] in names else -1, row["request"], row["rank"])
        )
        places = {(row["rank"], row["request"]): place for place, row in enumerate(rows)}
        log.pairs = [
            pair | {"request": places[rank, pair["request"]], "rank": rank}
            for rank, one in enumerate(logs)
            for pair in one["pairs"]
        ]
        log.pairs.sort(key=lambda pair: pair["request"])
        log.rows = [row | {"request": place} for place, row in enumerate(rows)]
        log.target_forwards = sum(one["target_forwards"] for one in logs)
        with staged(log.directory) as staging:
            (staging / METRICS).write_text("".join(dumps(row) + "\n" for row in log.rows), encoding="utf-8")
        return log

    def same(self, weights: dict[str, Tensor]) -> bool | None:
        """Tell whether all serving ranks have exactly the same weights; `None` if one of them is gone."""
        try:
            return self.serving.same(weights)
        except RanksParted:
            return None

    def flush(self, assistant: OnlineAssistant):
        """Learn from all waiting feedback of all ranks, and serve the result on all of them."""
        assistant.flush()
        if self.roles is not None:
            try:
                self.serving.sum(1)
            except RanksParted:
                return
            assistant.flush()  # what other ranks sent in between

    def leave(self):
        """Leave the job's process group, at the end: an interpreter that ends while gloo's threads hold tensors aborts now and then (pytorch#190489), and the job then counts as failed."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gc.collect()  # trainers, which hold the group, are in reference cycles
        self.accelerator.end_training()
