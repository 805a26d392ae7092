"""`RankGroup`: lets the processes that learn one draft together agree on numbers. It knows neither drafts nor learning."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

# Variables by which torchrun and accelerate launch let a process know that it is one of several.
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class RanksParted(RuntimeError):
    """Raised when a rank has gone, or has not answered within the process group's timeout: there is no agreeing any more."""


class RankGroup:
    """Exchanges values among the processes of a job. Each calls every method at the same point as the others do, with its own values, and all get the same answer,
    bit for bit. One process alone agrees with itself, at no cost.

    Args:
        size (`int`), rank (`int`): how many there are, and which this one is.
        device (`torch.device`): where the backend wants the tensors.
        group (`dist.ProcessGroup`, *optional*): all of torch.distributed's processes if left out.

    Attributes:
        parted (`bool`): a rank has gone.
    """

    def __init__(
        self,
        size: int = 1,
        rank: int = 0,
        device: torch.device | str = "cpu",
        group: dist.ProcessGroup | None = None,
    ):
        self.size, self.rank, self.device, self._group = size, rank, torch.device(device), group
        self.parted = False

    @classmethod
    def of_job(cls) -> RankGroup:
        """Make the group of processes among which accelerate, and with it Trainer, shares out training.

        Raises:
            ValueError: if this process is one of several and accelerate has not been set up.
        """
        from accelerate import PartialState
        from accelerate.state import is_initialized

        if is_initialized():
            state = PartialState()
            return cls(state.num_processes, state.process_index, state.device)
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and "LOCAL_RANK" in os.environ:
            raise ValueError(
                f"This is one of {launched} processes, and they have not met: learning would wait for the others at its first step. Make an "
                "accelerate.Accelerator() before the OnlineAssistant, or start one process."
            )
        return cls()

    def each(self, *numbers: float) -> Tensor:
        """Collect every rank's numbers: float64 `(size, len(numbers))`.

        Raises:
            RanksParted: if a rank has gone. So do all that follow.
        """
        return self._exchange(torch.tensor(numbers, dtype=torch.float64, device="cpu"))

    def sum(self, *numbers: float) -> list[float]:
        """Sum each number over ranks."""
        return list(numbers) if self.size == 1 else self.each(*numbers).sum(0).tolist()

    def most(self, number: int) -> int:
        """Return the largest number of all ranks."""
        return number if self.size == 1 else int(self.each(number).max())

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on some rank."""
        return bool(self.most(int(flag)))

    def gather(self, parts: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Collect the vectors `(N,)` of all ranks, rank by rank; on the CPU, in `dtype`."""
        if self.size == 1:
            return list(parts)
        counts = self.each(len(parts), sum(map(len, parts))).long()  # (size, 2)
        lengths = self._exchange(
            _padded(
                torch.tensor([len(part) for part in parts], dtype=torch.long, device="cpu"), int(counts[:, 0].max())
            )
        )
        values = [part.to("cpu", dtype) for part in parts]
        values = torch.cat(values) if values else torch.zeros(0, dtype=dtype, device="cpu")
        values = self._exchange(_padded(values, int(counts[:, 1].max())))
        found: list[Tensor] = []
        for rank, (number, total) in enumerate(counts.tolist()):
            found += values[rank, :total].split(lengths[rank, :number].tolist()) if number else []
        return found

    def gather_json(self, value: Any) -> list:
        """Collect a value of every rank that JSON can hold."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        return [json.loads(part.numpy().tobytes()) for part in self.gather([data], torch.uint8)]

    def same(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether all ranks have the very same tensors."""
        if self.size == 1:
            return True
        digest = hashlib.sha256()
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
        found = self._exchange(torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64))
        return bool((found == found[0]).all())

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Fail on all ranks if the block fails on one. In the block no rank may wait for another.

        Raises:
            RuntimeError: on the ranks where it went well; on the others, their own error.
        """
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree_on(failure)

    def agree_on(self, failure: Exception | None):
        """Raise on all ranks if there is a `failure` on one.

        Raises:
            RuntimeError: on the ranks that have none; on the others, their failure.
        """
        failed = [failure is not None] if self.size == 1 else self.each(failure is not None)[:, 0].bool().tolist()
        if failure is not None:
            raise failure
        if any(failed):
            raise RuntimeError(f"It failed on rank {failed.index(True)}, whose log says how.")

    def _exchange(self, mine: Tensor) -> Tensor:
        """Stack tensors of one shape and dtype by rank, on the CPU. They are gathered and not reduced, lest the order of sums differs from rank to rank."""
        if self.parted:
            raise RanksParted("The ranks have parted before.")
        mine = mine.to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        try:
            if self.size == 1:
                parts = [mine]
            elif mine.numel():
                dist.all_gather(parts, mine, group=self._group)
        except RuntimeError as error:
            self.parted = True
            raise RanksParted(f"Another rank has gone, or does not answer: {error}") from error
        return torch.stack(parts).cpu()


def check_job(ranks: RankGroup, alone: bool):
    """See that several processes can learn together: all at the same moments, and each with a whole copy of what trains."""
    from accelerate import PartialState

    if not alone:
        raise ValueError(
            f"This is one of {ranks.size} processes, whose gradients are averaged: all must learn at the same moment, which a thread of its own cannot. "
            "Pass learn='inline' and call the assistant's update_together on all ranks, or let another process learn (docs/scale.md)."
        )
    kind = PartialState().distributed_type.value
    if kind != "NO" and not kind.startswith("MULTI_"):
        raise ValueError(
            f"The job was launched for {kind}, which shards what trains. An OnlineAssistant judges, averages and takes back whole drafts: launch it without "
            "(accelerate launch --multi_gpu), or train a draft too large for that offline, with OnlineGKDTrainer (docs/scale.md)."
        )


def _padded(values: Tensor, length: int) -> Tensor:
    return torch.cat([values, values.new_zeros(length - len(values))])
