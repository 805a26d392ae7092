"""The one source of figures about speed: everything is measured in one process, interleaved, and reported as medians.

    python -m recipes.benchmarks.benchmark --methods plain,assisted,online --draft my-draft --stream my.jsonl --json methods.json
    python -m recipes.benchmarks.benchmark --what overhead --json overhead.json
    python -m recipes.benchmarks.benchmark --what lookahead --json lookahead.json
    python -m recipes.benchmarks.benchmark --what background --json background.json

`methods` serves the same requests by each method in turn; `overhead` is what hf_osd adds to the models' own work; `lookahead` what each policy
for γ would have made of recorded answers; `background` what learning in a thread or a process takes from serving. What they write is described in docs/recipes.md.
"""

from __future__ import annotations

import platform
import statistics
import sys
from dataclasses import asdict, dataclass, field

import torch

from hf_osd import OnlineConfig, record_answers
from hf_osd.distill.collator import FeedbackCollator
from hf_osd.distill.scoring import answer_logits
from hf_osd.models.draft_head import DraftHead
from hf_osd.system.strict_json import dumps, write_json
from recipes.benchmarks.beside import Beside
from recipes.benchmarks.methods import METHODS, Contest, names_of
from recipes.benchmarks.overhead import BareForwards, Overhead
from recipes.benchmarks.regret import Trace, regrets
from recipes.benchmarks.workload import WARM_UP, Workload
from recipes.common.command import check_numbers, numbers_of, run_command
from recipes.common.memory import peak_rss_mb
from recipes.common.models import ModelArguments

# A benchmark serves a draft as it is, unless told otherwise.
DEFAULTS = {"learn": "off"}
# Forwards of each size timed where costs are measured for `lookahead`.
_TIMED = 15


@dataclass
class BenchmarkArguments(ModelArguments):
    """What to measure, on what; all other arguments are those of `OnlineConfig`."""

    what: str = field(
        default="methods", metadata={"help": "What to measure: 'methods', 'overhead', 'lookahead' or 'background'."}
    )
    methods: str = field(
        default="plain,assisted,prompt_lookup,online",
        metadata={"help": f"Methods to compare, with ',' between: {', '.join(METHODS)}."},
    )
    stream: str = field(
        default="stdlib", metadata={"help": "A JSONL file or a built-in stream, see recipes/common/prompts.py."}
    )
    requests: int = field(default=8, metadata={"help": "Requests served with each setting, each repeat."})
    skip: int = field(default=0, metadata={"help": "Prompts left out before the first request."})
    held_back: int = field(
        default=0, metadata={"help": "Take prompts from those that a job with this flag and seed held back."}
    )
    warm: int = field(
        default=0,
        metadata={"help": "Requests just before the measured ones that online methods serve first, untimed."},
    )
    before: str | None = field(
        default=None,
        metadata={"help": "Another draft, that of the method 'before': --draft as it was before it learnt."},
    )
    gammas: str = field(default="1,2,3,4,5,7", metadata={"help": "γ that 'assisted' chooses from."})
    lookups: str = field(default="3,5,10", metadata={"help": "Lengths that 'prompt_lookup' chooses from."})
    repeats: int = field(default=5, metadata={"help": "Repeats; the figures are medians over them."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest answer, in tokens."})
    sample: bool = field(default=False, metadata={"help": "Sample, by the target's generation config."})
    chat_template: bool = field(default=True, metadata={"help": "Put prompts through the tokenizer's chat template."})
    json: str | None = field(default=None, metadata={"help": "Also write the figures to this file."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the file of --json, if it is there."})

    def __post_init__(self):
        if self.what not in MEASURES:
            raise ValueError(f"`what` is {self.what!r}; choose one of {', '.join(map(repr, MEASURES))}.")
        super().__post_init__()
        if "before" in names_of(self.methods) and self.before is None:
            raise ValueError(
                "`methods` has 'before' and `before` is empty; name the draft as it was, such as --before Qwen/Qwen3-0.6B."
            )
        for name in ("gammas", "lookups"):
            numbers_of(getattr(self, name), name)
        least = {"requests": 1, "skip": 0, "held_back": 0, "warm": 0, "repeats": 1, "max_new_tokens": 2, "threads": 1}
        check_numbers(self, least)
        if self.sample and self.what != "methods":
            raise ValueError(f"`sample` is for --what methods; {self.what!r} is measured on greedy answers.")


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit status."""
    return run_command(BenchmarkArguments, measure, argv, DEFAULTS)


def measure(args: BenchmarkArguments, config: OnlineConfig):
    """The figures, as a table or JSON to the console, and as JSON to the file asked for."""
    figures = MEASURES[args.what](args, config)
    figures |= {"machine": machine(), "arguments": asdict(args) | {"config": config.to_dict()}}
    if args.json is not None:
        write_json(args.json, figures)
    if args.what == "methods":
        print(table(figures["methods"]))
    else:
        print(dumps(figures[args.what], indent=2))


def methods(args: BenchmarkArguments, config: OnlineConfig) -> dict:
    contest = Contest(args, config)
    return {"methods": contest.run(), "prompts": prompts_of(contest.work)}


def overhead(args: BenchmarkArguments, config: OnlineConfig) -> dict:
    work = Overhead(args, config)
    return {"overhead": work.measure(), "prompts": prompts_of(work.work)}


def background(args: BenchmarkArguments, config: OnlineConfig) -> dict:
    work = Beside(args, config)
    return {"background": work.measure(), "prompts": prompts_of(work.work)}


def lookahead(args: BenchmarkArguments, config: OnlineConfig) -> dict:
    """Each policy's rate, and its regret beside the best fixed γ, on the target's own answers and what the draft says of them."""
    work = Workload(args, config.seed)
    prompts = [request["ids"] for request in work.requests]
    answers = record_answers(work.target, prompts, args.max_new_tokens, top_k=config.top_k)
    traces = traces_of(work.draft, answers)
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
def traces_of(draft, answers: list) -> list[Trace]:
    """What the draft says at each position of the answers, teacher-forced, and how sure it is."""
    collate, traces = FeedbackCollator("all"), []
    for answer in answers:
        batch = {k: v.to(draft.device) if hasattr(v, "to") else v for k, v in collate([answer]).items()}
        top = answer_logits(draft, batch).float().softmax(-1).max(-1)
        hits = (top.indices.cpu() == answer.answer).int()
        traces.append(Trace(hits.tolist(), top.values.tolist()))
    return traces


def costs_of(bare: BareForwards, most: int) -> tuple[float, float]:
    """c, and the slope of v from one token to `most`+1."""
    timed = [(bare.verify(1), bare.verify(most + 1), bare.step()) for _ in range(_TIMED + WARM_UP)][WARM_UP:]
    one, block, step = (statistics.median(times) for times in zip(*timed, strict=True))
    return step / one, max(block / one - 1, 0.0) / most


def prompts_of(work: Workload) -> dict:
    """Which prompts were used, by the ids of their rows."""
    ids = {name: [row["id"] for row in getattr(work, name)] for name in ("requests", "warm", "warm_up")}
    return {"stream": work.name, **ids}


def table(found: dict[str, dict]) -> str:
    """A line a method."""
    columns = {
        "tok/s": ("tokens_per_second", "{:.1f}"),
        "speed-up": ("speedup_vs_plain", "{:.2f}"),
        "decode only": ("speedup_decode_only", "{:.2f}"),
        "ideal": ("ideal_speedup", "{:.2f}"),
        "of ideal": ("share_of_ideal", "{:.0%}"),
        "alpha": ("alpha", "{:.3f}"),
        "tok/round": ("tokens_per_round", "{:.2f}"),
        "c": ("c", "{:.2f}"),
        "identical": ("identical_share", "{:.0%}"),
        "near-ties": ("near_ties", "{}"),
        "mismatches": ("mismatches", "{}"),
    }
    lines = [["", *columns]]
    for name, figures in found.items():
        lines.append([name, *(_cell(figures[key], form) for key, form in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )


def _cell(value, form: str) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return f"{form.format(value['median'])} ({form.format(value['min'])}-{form.format(value['max'])})"
    return form.format(value)


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
        "peak_rss_mb": peak_rss_mb(),
    }


if __name__ == "__main__":
    sys.exit(main())
