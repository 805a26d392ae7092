"""What the ranks of tests/distributed/test_lora.py do: learn one adapter together, each with other memory and other requests, and without a seed."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed as dist

from hf_osd import OnlineAssistant
from hf_osd.learning import memory

GIB = 2**30


def main(folder: Path):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    Accelerator(cpu=True)
    given = torch.load(folder / "given.pt", weights_only=False)
    # Where there is the least, half of it is what the adapter of rank 2 takes.
    memory.available = lambda device: [64 * GIB, given["least"]][rank]
    torch.manual_seed(rank)  # whatever else is random differs
    assistant = OnlineAssistant(
        given["draft"], adapter="lora", lora=8, update_interval=2, warmup_steps=0, gate=False, learning_rate=1e-3
    )
    begun = {name: w.clone() for name, w in assistant.serving.weights()}
    for request in given["requests"][rank]:
        assistant.learner.add(request)
    refreshed = assistant.update_together(force=True)
    found = {
        "rank": assistant.adapter.rank,
        "choice": assistant.learning_choice,
        "begun": begun,
        "learnt": {name: w.clone() for name, w in assistant.serving.weights()},
        "served": {name: p.clone() for name, p in assistant.serving.active.named_parameters()},
        "refreshed": refreshed,
    }
    torch.save(found, folder / f"found.{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that ends with them (pytorch#190489)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
