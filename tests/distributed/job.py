"""What the ranks of a job do together, one scene after the other. Not a test: test_ranks.py runs it in two processes."""

import functools
import itertools
import json
import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch import distributed as dist
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.training_args import OptimizerNames

from hf_osd import FeedbackBuffer, OnlineAssistant, OnlineConfig
from hf_osd.distill.ensemble import make_student
from hf_osd.distill.ranks import RankGroup
from hf_osd.distill.scoring import Judged
from hf_osd.distill.trainer import OnlineGKDTrainer
from hf_osd.feedback.trace import read_trace
from hf_osd.learning import memory
from hf_osd.learning.contenders import Contenders, Point
from hf_osd.learning.learner import Learner

# One step over all requests: nothing that could hide a factor.
PLAIN = {
    "batch_size": None,
    "replay_ratio": 0.0,
    "ema_decay": 0.0,
    "gate": False,
    "sampled_columns": None,
    "warmup_steps": 0,
    "learning_rate": 0.1,
    "seed": 0,
}
# And all that may differ from rank to rank.
FULL = {
    "batch_size": 2,
    "replay_ratio": 3.0,
    "ema_decay": 0.9,
    "optimism": 0.5,
    "ensemble": [1, 2],
    "sampled_columns": 32,
    "learning_rate": 1e-3,
    "seed": 0,
}
# Requests of each rank.
SPLITS = {"equal": (4, 4), "unequal": (1, 6), "empty": (5, 0)}
GIB = 2**30


class Gradients(TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        named = {n.removeprefix("module."): p for n, p in model.named_parameters()}
        self.steps.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})


def make(draft, config: dict, alone: bool = True) -> tuple[Learner, dict]:
    """A learner of the draft's layers, and what it serves."""
    served = {name: p.detach().clone() for name, p in draft.named_parameters() if "layers" in name}
    serve = lambda weights: served.update({name: tensor.clone() for name, tensor in weights.items()})  # noqa: E731
    return Learner(
        make_student(draft, set(served), OnlineConfig(**config)), FeedbackBuffer(), serve, alone=alone
    ), served


def one_step(draft, requests: list) -> dict:
    """Gradients and weights of one update on `requests`."""
    learner, served = make(draft, PLAIN)
    gradients = Gradients()
    trainer = learner.student.trainer
    trainer.args.optim, trainer.args.max_grad_norm = OptimizerNames.SGD, 0.0
    trainer.add_callback(gradients)
    for request in requests:
        learner.buffer.add(request)
    assert learner.update()
    [step] = gradients.steps
    return {f"grad.{name}": grad for name, grad in step.items()} | served


def feature_step(draft, requests: list) -> dict:
    """Gradients of one step of a draft that reads states."""
    trainer, gradients = OnlineGKDTrainer(draft, FeedbackBuffer(), OnlineConfig(**PLAIN)), Gradients()
    trainer.args.optim, trainer.args.max_grad_norm = OptimizerNames.SGD, 0.0
    trainer.add_callback(gradients)
    trainer.learn(requests)
    [step] = gradients.steps
    return step


class Job:
    def __init__(self, folder: Path):
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
        Accelerator(cpu=True)
        self.folder, self.ranks = folder, RankGroup.of_job()
        self.draft = AutoModelForCausalLM.from_pretrained(folder / "draft")
        self.requests, _ = read_trace(folder / "requests.safetensors")
        self.facts = {}

    def run(self):
        self.agreeing()
        for name, (first, second) in SPLITS.items():
            mine = self.requests[:first] if self.ranks.rank == 0 else self.requests[first : first + second]
            self.keep(name, one_step(self.draft, mine))
        self.learning()
        self.finding()
        self.failing()
        self.beginning()
        self.serving()
        self.reading_states()
        self.adapting()
        self.parting()  # the last
        (self.folder / f"facts.{self.ranks.rank}").write_text(json.dumps(self.facts))

    def agreeing(self):
        rank, ranks = self.ranks.rank, self.ranks
        mine = [torch.full((3,), float(rank)), torch.tensor([torch.nan])] if rank == 0 else []
        facts = {
            "sum": ranks.sum(rank + 1, 0.5),
            "most": ranks.most(7 - rank),
            "any": [ranks.any(rank == 1), ranks.any(False)],
            "gather": [part.nan_to_num(-1).tolist() for part in ranks.gather(mine)],
            "nothing": ranks.gather([]),
            "json": ranks.gather_json({"rank": rank, "text": "α" * (rank + 1)}),
            "same": [ranks.same({"a": torch.ones(2)}), ranks.same({"a": torch.full((2,), float(rank))})],
            "together": None,
        }
        try:
            with ranks.together():
                if rank == 1:
                    raise KeyError("here")
        except Exception as error:
            facts["together"] = repr(error)
        self.facts["agreeing"] = facts

    def learning(self):
        """Rank 1 has fewer requests, at times none; and once they speak against the candidate, which those of rank 0 do not."""
        rank, (learner, served) = self.ranks.rank, make(self.draft, FULL)
        requests = (replace(request) for request in itertools.cycle(self.requests))  # each one of its own
        counts = []
        for i in range(6):
            learner.contenders.score = functools.partial(self.says, learner.contenders, i)
            for _ in range(16 if rank == 0 or i % 2 == 0 else 0):
                learner.add(next(requests))
            learner.update_together(force=True)
            counts.append([learner.updates, learner.contenders.dropped, learner.failed])
            self.keep(f"learning.{i}", served)
        self.facts["learning"] = {
            "counts": counts,
            "learned": learner.learned_tokens,
            "shares": learner.student.shares,
        }
        self.facts["estimate"] = learner.metrics()["estimate"].to_dict()

    def says(self, contenders: Contenders, i: int, requests: list, point: Point, whole: bool = True) -> list[Judged]:
        alpha = 0.5
        if point is contenders.static:
            alpha = 0.1
        elif point is contenders._candidate:
            alpha = 0.9 if i != 4 else 0.5 if self.ranks.rank == 0 else 0.0
        return [Judged(*(torch.full((len(one),), value) for value in (alpha, 0.5, alpha))) for one in requests]

    def finding(self):
        """A rate, of requests that lie on rank 0 alone; and nothing where no rank has enough of them."""
        (learner, _), facts = make(self.draft, {**FULL, "learning_rate": "auto", "ensemble": None}), []
        for count in ((1, 1), (6, 0), (0, 6)):
            for request in self.requests[: count[self.ranks.rank]]:
                learner.add(replace(request))
            learner.update_together(force=True)
            # Those of the first round stay new, and are learnt with the others.
            facts.append(
                [learner.updates, learner.failed, learner.rate.value, learner.rate.passes, learner.rate.reason]
            )
        self.facts["finding"] = facts
        self.facts["found by"] = learner.contenders.shadow.requests
        self.keep("finding", learner.student.serving_weights())

    def failing(self):
        rank, (learner, served) = self.ranks.rank, make(self.draft, {**PLAIN, "batch_size": 2})
        before = {name: tensor.clone() for name, tensor in served.items()}
        trainer = learner.student.trainer
        whole, calls = trainer._loss, []

        def breaks(*args):
            calls.append(None)
            if rank == 1 and len(calls) == 2:
                raise MemoryError("out of memory")
            return whole(*args)

        trainer._loss = breaks
        for request in self.requests[:6]:
            learner.buffer.add(request)
        outcomes = [learner.update()]
        undone = all(torch.equal(tensor, before[name]) for name, tensor in learner.student.serving_weights().items())
        for start in (6, 12):
            for request in self.requests[start : start + 6]:
                learner.buffer.add(request)
            outcomes.append(learner.update())
        self.keep("failing", served)
        self.facts["failing"] = {"outcomes": outcomes, "failed": learner.failed, "undone": undone}

    def beginning(self):
        """What is refused."""
        found = {}
        learner, _ = make(self.draft, PLAIN)
        learner.load_weights({name: tensor + self.ranks.rank for name, tensor in learner.student.weights().items()})
        learner.buffer.add(self.requests[0])
        state = PartialState()
        kind = state.distributed_type

        def sharded():
            state.distributed_type = DistributedType.FSDP
            make(self.draft, PLAIN)

        for name, call in (
            ("other draft", learner.update),
            ("background", lambda: make(self.draft, PLAIN, alone=False)),
            ("sharded", sharded),
        ):
            try:
                call()
            except ValueError as error:
                found[name] = str(error)
        state.distributed_type = kind
        self.facts["refused"] = found

    def serving(self):
        """Calls of generate start no update by themselves, where one rank has more of them than the other."""
        target = AutoModelForCausalLM.from_pretrained(self.folder / "draft")
        assistant = OnlineAssistant(self.draft, OnlineConfig(**{**PLAIN, "update_interval": 1, "draft_cost": 0.1}))
        for i in range(3 if self.ranks.rank == 0 else 1):
            target.generate(
                torch.tensor([[3 + i, 4, 5]]), assistant_model=assistant, max_new_tokens=4, do_sample=False
            )
        before = assistant.stats.updates
        refreshed = [assistant.update_together(), assistant.update_together(), assistant.flush()]
        self.facts["serving"] = {"before": before, "refreshed": refreshed, "updates": assistant.stats.updates}

    def reading_states(self):
        """A step of a draft that reads states, where both have some and where one has none."""
        for name, requests in torch.load(self.folder / "features.pt", weights_only=False).items():
            draft = torch.load(self.folder / "feature_draft.pt", weights_only=False)
            self.keep(f"features.{name}", feature_step(draft, requests[self.ranks.rank]))

    def adapting(self):
        """One adapter, each with other memory and other requests, and without a seed."""
        rank, given = self.ranks.rank, torch.load(self.folder / "adapter.pt", weights_only=False)
        config = {"update_interval": 2, "warmup_steps": 0, "gate": False, "learning_rate": 1e-3}
        whole = memory.available
        # Where there is the least, half of it is what the adapter of rank 2 takes.
        memory.available = lambda device: [64 * GIB, given["least"]][rank]
        torch.manual_seed(rank)  # whatever else is random differs
        assistant = OnlineAssistant(given["draft"], adapter="lora", lora=8, **config)
        memory.available = whole
        self.keep("adapter.begun", {name: w.clone() for name, w in assistant.serving.weights()})
        for request in given["requests"][rank]:
            assistant.learner.add(request)
        refreshed = assistant.update_together(force=True)
        self.keep("adapter.learnt", {name: w.clone() for name, w in assistant.serving.weights()})
        self.keep("adapter.served", {n: p.clone() for n, p in assistant.serving.active.named_parameters()})
        self.facts["adapting"] = [assistant.adapter.rank, repr(assistant.learning_choice), refreshed]

    def parting(self):
        learner, served = make(self.draft, PLAIN)
        learner.buffer.add(self.requests[0])
        self.facts["parting"] = [learner.update_together()]  # not due
        if self.ranks.rank == 1:
            (self.folder / "facts.1").write_text(json.dumps(self.facts))
            os._exit(0)
        self.facts["parting"] += [learner.update_together(force=True), learner.update_together(force=True)]
        self.facts["parting"] += [learner.ranks.parted, learner.failed]

    def keep(self, name: str, tensors: dict):
        save_file(dict(tensors), self.folder / f"{name}.{self.ranks.rank}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    Job(Path(sys.argv[1])).run()
    os._exit(0)  # rank 1 is gone: there is no leaving the group together
