"""Two ranks that serve and one that learns. Not a test: test_separate.py runs it in three processes, of which two die on the way."""

import json
import logging
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from hf_osd import OnlineAssistant
from hf_osd.remote.roles import JobRoles, LearningRank, serve_separately

CONFIG = {"update_interval": 4, "draft_cost": 0.1, "gate": False, "warmup_steps": 0, "seed": 0}
CONFIG |= {"learning_rate": 1e-3}


class Mortal(LearningRank):
    """One that can be told to die."""

    def _handle(self, rank, kind, tensors, values):
        if kind == "die":
            os._exit(0)
        super()._handle(rank, kind, tensors, values)


class Apart:
    def __init__(self, folder: Path):
        self.roles, self.folder = JobRoles(f"file://{folder}/store"), folder
        self.assistant = OnlineAssistant(AutoModelForCausalLM.from_pretrained(folder / "draft"), **CONFIG)
        self.facts = {}

    def run(self):
        if self.roles.learns:
            Mortal(self.assistant, self.roles).run()
            return
        self.target = AutoModelForCausalLM.from_pretrained(self.folder / "target")
        serve_separately(self.assistant, self.roles)
        self.facts["learner's own"] = [self.assistant.stats.updates]
        self.facts["same"] = [self.serve(6), self.assistant.flush() or self.assistant.serving.version > 0]
        # Whoever asks last gets what the other's requests have taught too.
        self.roles.serving.sum(1)
        self.assistant.flush()
        self.keep("together")
        self.facts["together"] = self.figures()
        if self.roles.rank == 1:
            self.end()
        self.serve(6)
        self.facts["alone"] = [self.assistant.flush(), self.figures()]
        self.keep("alone")
        self.assistant.learner.transport.send("die")
        self.facts["nobody"] = [self.assistant.flush(), self.serve(5), self.assistant.learner.is_due()]
        self.facts["over"] = self.assistant.stats.learning_over
        self.keep("nobody")
        self.assistant.close()
        self.end()

    def serve(self, count: int) -> bool:
        """Whether all outputs are the target's own."""
        same = True
        for i in range(count):
            prompt = torch.tensor([[3 + i, 4 + self.roles.rank, 5]])
            settings = {"max_new_tokens": 8, "do_sample": False}
            output = self.target.generate(prompt, assistant_model=self.assistant, **settings)
            same &= torch.equal(output, self.target.generate(prompt, **settings))
            self.assistant.update()
        return same

    def figures(self) -> dict:
        stats = self.assistant.stats
        return {"updates": stats.updates, "failed": stats.failed_updates, "requests": stats.total.requests}

    def keep(self, name: str):
        weights = {n: p.clone() for n, p in self.assistant.serving.weights()}
        save_file(weights, self.folder / f"{name}.{self.roles.rank}")

    def end(self):
        (self.folder / f"facts.{self.roles.rank}").write_text(json.dumps(self.facts))
        os._exit(0)  # as one that is killed: it says nothing


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    Apart(Path(sys.argv[1])).run()
