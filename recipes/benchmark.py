"""The one source of figures about cost: everything is measured in one process, interleaved, and reported as medians.

    python recipes/benchmark.py --what overhead --json overhead.json

`overhead` serves the same requests with capture on and off in turn, then times updates against the bare forward, backward and step of the
same batches.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command import check_numbers, run_command
from models import ModelArguments, encode, load_draft, load_target, use_threads
from torch import Tensor

from hf_osd import OnlineAssistant, OnlineConfig, record_answers
from hf_osd.distill.losses import divergence, draft_buckets, target_buckets
from hf_osd.scoring import answer_logits


@dataclass
class BenchmarkArguments(ModelArguments):
    """What to measure, on what."""

    what: str = field(default="overhead", metadata={"help": "What to measure: 'overhead'."})
    stream: str = field(default="stdlib", metadata={"help": "JSONL files or built-in streams, see prompts.py."})
    requests: int = field(
        default=8,
        metadata={"help": "Requests served with each setting, each repeat; an update learns `update_interval`."},
    )
    repeats: int = field(default=5, metadata={"help": "Repeats; the figures are medians over them."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    json: str | None = field(default=None, metadata={"help": "Also write the figures to this file."})

    def __post_init__(self):
        if self.what != "overhead":
            raise ValueError(f"`what` is {self.what!r}; choose 'overhead'.")
        super().__post_init__()
        check_numbers(self, {"requests": 1, "repeats": 1, "max_new_tokens": 1})


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    return run_command(BenchmarkArguments, measure, argv)


def measure(args: BenchmarkArguments, config: OnlineConfig):
    """The figures, as JSON to the console and to the file asked for."""
    figures = {"overhead": Overhead(args, config).measure(), "machine": machine()}
    print(json.dumps(figures, indent=2))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


class Overhead:
    """What capture costs serving, and what hf_osd and Trainer cost learning."""

    def __init__(self, args: BenchmarkArguments, config: OnlineConfig):
        from prompts import load_streams

        use_threads(args.threads)
        self.args = args
        # A constant γ: the same work in every repeat, whatever the clock says. No update falls due by itself.
        never, self.interval = 10**9, config.update_interval
        self.config = OnlineConfig.from_dict(
            {**config.to_dict(), "lookahead": "constant", "update_interval": never, "seed": config.seed or 0}
        )
        self.target, tokenizer = load_target(args.target, args.dtype)
        name, rows = load_streams(args.stream, self.config.seed)[0]
        prompts = [encode(tokenizer, row["prompt"])[None] for row in rows[: max(args.requests, self.interval)]]
        self.prompts, self.learnt = prompts[: args.requests], prompts[: self.interval]
        self.draft = load_draft(args.draft, self.target)

    def measure(self) -> dict:
        return {"capture": self.capture(), "learning": self.learning()}

    def capture(self) -> dict:
        """The same requests, served with capture on and off in turn."""
        on = OnlineAssistant(self.draft, self.config)
        off = OnlineAssistant(self.draft, self.config, learn=False)
        for assistant in (on, off):
            self._serve(assistant, self.prompts[0])  # warm up
        ratios, shares, splits = [], [], []
        for repeat in range(self.args.repeats):
            seconds = {on: 0.0, off: 0.0}
            before = copy.deepcopy(on.stats.total)
            for i, prompt in enumerate(self.prompts):
                for assistant in (on, off) if (repeat + i) % 2 else (off, on):
                    seconds[assistant] += self._serve(assistant, prompt)
            total = on.stats.total
            rounds = total.rounds - before.rounds
            parts = {
                name: getattr(total, f"{name}_seconds") - getattr(before, f"{name}_seconds")
                for name in ("draft", "target", "capture")
            }
            parts["python"] = seconds[on] - sum(parts.values())
            ratios.append(seconds[on] / seconds[off])
            shares.append(parts["capture"] / seconds[on])
            splits.append({name: 1e3 * value / rounds for name, value in parts.items()})
        return {
            "decode_seconds_on_over_off": spread(ratios),
            "capture_share_of_decode": spread(shares),
            "round_ms": {name: statistics.median(split[name] for split in splits) for name in splits[0]},
            "bytes_a_position": on.buffer.nbytes / on.buffer.tokens,
            "requests": len(self.prompts),
            "repeats": self.args.repeats,
        }

    def learning(self) -> dict:
        """Updates as the learner makes them, against the bare forward, backward and step of the same batches, in turn."""
        assistant = OnlineAssistant(self.draft, self.config)
        learner = assistant.learner
        bare = copy.deepcopy(
            learner.module
        )  # before the trainer patches forward: a later copy would run the original's weights
        trainer = learner.trainer
        feedback = record_answers(self.target, [p[0] for p in self.learnt], self.args.max_new_tokens)
        replayed = round(self.config.replay * len(feedback))
        optimizer = torch.optim.AdamW([p for p in bare.parameters() if p.requires_grad], lr=self.config.learning_rate)
        ratios, throughput, tokens = [], [], 0
        for repeat in range(self.args.repeats + 1):
            for item in feedback:
                assistant.buffer.add(item)
            requests = [*feedback, *(feedback[i % len(feedback)] for i in range(replayed))]
            trainer._requests = requests
            batches = list(trainer.get_train_dataloader())
            trainer._requests = None
            timed = {}
            for what in ("update", "bare") if repeat % 2 else ("bare", "update"):
                start = time.perf_counter()
                if what == "update":
                    assistant.flush()
                else:
                    bare.train()
                    for batch in batches:
                        self._bare_step(bare, optimizer, batch, learner.autocast_dtype)
                timed[what] = time.perf_counter() - start
            tokens = sum(len(batch["rows"]) for batch in batches)
            if repeat:  # the first warms up
                ratios.append(timed["update"] / timed["bare"])
                throughput.append(tokens / timed["update"])
        return {
            "update_seconds_over_bare": spread(ratios),
            "learned_tokens_per_second": spread(throughput),
            "tokens_an_update": tokens,
            "failed_updates": learner.failed,
            "learner_dtype": "float32" if learner.autocast_dtype is None else str(learner.autocast_dtype),
        }

    def _serve(self, assistant: OnlineAssistant, prompt: Tensor) -> float:
        assistant.update()  # take in the call before, outside the timed part
        prompt = prompt.to(self.target.device)
        start = time.perf_counter()
        self.target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=self.args.max_new_tokens,
            do_sample=False,
            assistant_model=assistant,
        ).cpu()
        return time.perf_counter() - start

    def _bare_step(self, model, optimizer, batch: dict, autocast_dtype: torch.dtype | None):
        config = self.config
        batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        with torch.autocast(model.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            logits = answer_logits(model, batch)
        p, q = target_buckets(batch["top_logps"], batch["tail_logp"]), draft_buckets(logits, batch["top_ids"])
        divergence(p, q, config.divergence, config.beta, config.total_variation_weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict:
    """What the figures were measured on."""
    import transformers

    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    sys.exit(main())
