"""Measures speed: everything in one process, interleaved, and reported as medians. All figures about speed come from here.

    python -m recipes.benchmarks.benchmark --methods plain,assisted,online --draft my-draft --stream my.jsonl --json methods.json
    python -m recipes.benchmarks.benchmark --what overhead --json overhead.json
    python -m recipes.benchmarks.benchmark --what lookahead --json lookahead.json
    python -m recipes.benchmarks.benchmark --what background --json background.json

`methods` serves the same requests by each method in turn; `overhead` compares hf_osd with the bare forwards of its models; `lookahead` simulates each policy for γ
on recorded answers; `background` measures how much learning in a thread or a process slows serving. docs/recipes.md describes the output.
"""

from __future__ import annotations

import platform
import statistics
import sys
from dataclasses import asdict, dataclass

import torch

from hf_osd import OnlineConfig, record_answers
from hf_osd.distill.collator import FeedbackCollator
from hf_osd.distill.scoring import answer_logits
from hf_osd.models.draft_head import DraftHead
from hf_osd.system.bounds import choice, option, switch, whole
from hf_osd.system.strict_json import dumps, write_json
from recipes.benchmarks.beside import Beside
from recipes.benchmarks.methods import METHODS, Contest, names_of
from recipes.benchmarks.overhead import BareForwards, Overhead
from recipes.benchmarks.regret import Predictions, regrets
from recipes.benchmarks.workload import WARM_UP, Workload
from recipes.common.command import numbers_of, run_command
from recipes.common.figures import aligned, cell
from recipes.common.memory import peak_rss_mb
from recipes.common.models import ModelArguments
from recipes.common.options import optional_string, string

WHATS = ("methods", "overhead", "lookahead", "background")
# A benchmark serves the draft as it is, unless flags say otherwise.
DEFAULTS = {"learn": "off"}
# Timed forwards of each size, to measure the costs for `lookahead`.
_TIMED = 15


@dataclass
class BenchmarkArguments(ModelArguments):
    """What to measure, and on what. The fields of `OnlineConfig` are flags too."""

    what: str = option("methods", choice(*WHATS), "What to measure.")
    methods: str = option(
        "plain,assisted,prompt_lookup,online",
        string(),
        f"Methods to compare, with ',' between: {', '.join(METHODS)}. 'cache' always runs beside online methods.",
    )
    stream: str = option("stdlib", string(), "A JSONL file, dataset or built-in stream; see docs/recipes.md.")
    requests: int = option(8, whole(1), "Requests that each method serves in each repeat.")
    skip: int = option(0, whole(0), "Prompts to skip before the first measured request.")
    held_back: int = option(
        0,
        whole(0),
        "Take prompts from the N that distill.py or replay.py holds back with the same flag and seed; 0 takes them from the whole stream.",
    )
    warm: int = option(
        0, whole(0), "Requests just before the measured ones that online methods serve first, untimed; at most --skip."
    )
    before: str | None = option(
        None, optional_string(), "Draft of the method 'before': --draft as it was before it learnt."
    )
    gammas: str = option("1,2,3,4,5,7", string(), "Values of γ that 'assisted' chooses from, with ',' between.")
    lookups: str = option("3,5,10", string(), "Lengths that 'prompt_lookup' chooses from, with ',' between.")
    repeats: int = option(5, whole(1), "Repeats; the figures are medians over them.")
    max_new_tokens: int = option(64, whole(2), "Longest answer, in tokens.")
    sample: bool = option(False, switch(), "Sample with the target's generation config instead of decoding greedily.")
    chat_template: bool = option(True, switch(), "Apply the tokenizer's chat template to prompts.")
    json: str | None = option(None, optional_string(), "Also write the figures to this file.")
    overwrite: bool = option(False, switch(), "Replace the file of --json if there is one.")

    def __post_init__(self):
        super().__post_init__()
        if "before" in names_of(self.methods) and self.before is None:
            raise ValueError(
                "`methods` has 'before' and `before` is empty; name the draft as it was before it learnt, such as --before Qwen/Qwen3-0.6B."
            )
        for name in ("gammas", "lookups"):
            numbers_of(getattr(self, name), name)
        if self.sample and self.what != "methods":
            raise ValueError(f"`sample` is for --what methods; {self.what!r} is measured on greedy answers.")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    return run_command(BenchmarkArguments, measure, argv, DEFAULTS)


def measure(args: BenchmarkArguments, config: OnlineConfig):
    """Measure, write the figures to the file of `--json`, and print them as a table or JSON."""
    figures = MEASURES[args.what](args, config)
    figures |= {"machine": machine(), "arguments": asdict(args) | {"config": config.to_dict()}}
    if args.json is not None:
        write_json(args.json, figures)
    if args.what == "methods":
        print(table(figures["methods"]))
    else:
        print(dumps(figures[args.what], indent=2))


def methods(args: BenchmarkArguments, config: OnlineConfig) -> dict:
    """Serve the same requests by each method in turn."""
    contest = Contest(args, config)
    return {"methods": contest.run(), "prompts": prompts_of(contest.work)}


def overhead(args: BenchmarkArguments, config: OnlineConfig) -> dict:
    """Compare serving and learning with the bare forwards of the models."""
    work = Overhead(args, config)
    return {"overhead": work.measure(), "prompts": prompts_of(work.work)}


def background(args: BenchmarkArguments, config: OnlineConfig) -> dict:
    """Serve with and without learning in the background."""
    work = Beside(args, config)
    return {"background": work.measure(), "prompts": prompts_of(work.work)}


def lookahead(args: BenchmarkArguments, config: OnlineConfig) -> dict:
    """Simulate each policy for γ on the target's own answers: its rate, and its regret against the best fixed γ."""
    work = Workload(args, config.seed)
    prompts = [request["ids"] for request in work.requests]
    answers = record_answers(work.target, prompts, args.max_new_tokens, top_k=config.top_k)
    traces = predictions_of(work.draft, answers)
    most, c, slope = config.num_assistant_tokens, config.draft_cost, config.verify_cost
    if c is None:
        bare = BareForwards(
            work.target, work.draft, answers[0].tokens.long(), DraftHead.from_config(work.draft, config)
        )
        c, slope = costs_of(bare, most)
    found = {"costs": {"c": c, "verify_cost": slope, "measured": config.draft_cost is None}}
    found |= {"alpha": statistics.mean(hit for trace in traces for hit in trace.hits)}
    return {"lookahead": found | {"policies": regrets(traces, most, c, slope)}, "prompts": prompts_of(work)}


MEASURES = {"methods": methods, "overhead": overhead, "lookahead": lookahead, "background": background}


@torch.no_grad()
def predictions_of(draft, answers: list) -> list[Predictions]:
    """Let the draft predict each position of the answers, teacher-forced, with its confidence."""
    collate, traces = FeedbackCollator("all"), []
    for answer in answers:
        batch = {k: v.to(draft.device) if hasattr(v, "to") else v for k, v in collate([answer]).items()}
        top = answer_logits(draft, batch).float().softmax(-1).max(-1)
        hits = (top.indices.cpu() == answer.answer).int()
        traces.append(Predictions(hits.tolist(), top.values.tolist()))
    return traces


def costs_of(bare: BareForwards, most: int) -> tuple[float, float]:
    """Measure c, and the slope of v between one token and `most`+1."""
    timed = [(bare.verify(1), bare.verify(most + 1), bare.step()) for _ in range(_TIMED + WARM_UP)][WARM_UP:]
    one, block, step = (statistics.median(times) for times in zip(*timed, strict=True))
    return step / one, max(block / one - 1, 0.0) / most


def prompts_of(work: Workload) -> dict:
    """Say which prompts were used, by the ids of their rows."""
    ids = {name: [row["id"] for row in getattr(work, name)] for name in ("requests", "warm", "warm_up")}
    return {"stream": work.name, **ids}


def table(found: dict[str, dict]) -> str:
    """Lay out the figures with a line for each method."""
    columns = {
        "tok/s": ("tokens_per_second", "{:.1f}"),
        "speed-up": ("speedup_vs_plain", "{:.2f}"),
        "decode only": ("speedup_decode_only", "{:.2f}"),
        "gain of learning": ("gain_of_learning", "{:.2f}"),
        "end to end": ("gain_of_learning_end_to_end", "{:.2f}"),
        "ideal": ("ideal_speedup", "{:.2f}"),
        "of ideal": ("share_of_ideal", "{:.0%}"),
        "alpha": ("alpha", "{:.3f}"),
        "by step": ("alpha_by_step", "{:.3f}"),
        "tok/round": ("tokens_per_round", "{:.2f}"),
        "c": ("c", "{:.2f}"),
        "identical": ("identical_share", "{:.0%}"),
        "near-ties": ("near_ties", "{}"),
        "mismatches": ("mismatches", "{}"),
    }
    lines = [["", *columns]]
    for name, figures in found.items():
        lines.append([name, *(cell(figures[key], form) for key, form in columns.values())])
    return aligned(lines, right=True)


def machine() -> dict:
    """Describe the machine that the figures were measured on."""
    import transformers

    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "peak_rss_mb": peak_rss_mb(),
    }


if __name__ == "__main__":
    sys.exit(main())
