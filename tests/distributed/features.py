"""What the ranks of tests/distributed/test_features.py do: one optimizer step of a feature-level draft, each on its own requests."""

import os
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed as dist
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from hf_osd import FeedbackBuffer, OnlineConfig
from hf_osd.distill.trainer import OnlineGKDTrainer


class Gradients(TrainerCallback):
    """Keeps those of the step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {
            n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
        }


def one_step(draft, requests: list) -> dict:
    """The gradients of one step on `requests`."""
    config = OnlineConfig(batch_size=None, sampled_columns=None, warmup_steps=0, learning_rate=0.1, seed=0)
    trainer, gradients = OnlineGKDTrainer(draft, FeedbackBuffer(), config), Gradients()
    trainer.args.optim, trainer.args.max_grad_norm = OptimizerNames.SGD, 0.0
    trainer.add_callback(gradients)
    trainer.learn(requests)
    return gradients.found


def main(folder: Path):
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    Accelerator(cpu=True)
    given = torch.load(folder / "given.pt", weights_only=False)
    torch.save(one_step(given["draft"], given["requests"][rank]), folder / f"found.{rank}.pt")
    dist.barrier()
    os._exit(0)  # neither waits for the other's end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
