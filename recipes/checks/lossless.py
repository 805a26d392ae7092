"""Checks at length that outputs do not change: serves requests while the draft learns, decodes each plainly too, and compares the two outputs.

    python -m recipes.checks.lossless --stream one.jsonl,two.jsonl --requests 200 --output_dir runs/lossless

The exit status is 1 if any output differs by more than a near-tie. docs/recipes.md describes the files it writes.
"""

from __future__ import annotations

import logging
import random
import sys
from dataclasses import asdict, dataclass
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_osd import OnlineAssistant, OnlineConfig, compare_outputs
from hf_osd.system.bounds import option, switch, whole
from hf_osd.system.strict_json import dumps, write_json
from recipes.common.command import run_command
from recipes.common.domains import content_of, digest
from recipes.common.figures import mean, ratio, shown
from recipes.common.models import (
    ModelArguments,
    answer,
    draft_tokenizers,
    encode_rows,
    load_draft,
    load_target,
    print_of,
    use_threads,
)
from recipes.common.options import string
from recipes.common.report import setting_of
from recipes.common.run_folder import RunFolder
from recipes.common.run_log import RunLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("hf_osd.recipes.lossless")

# The draft drafts whether or not that pays, for where nothing is drafted nothing can go wrong.
DEFAULTS = {"lookahead": "constant", "num_assistant_tokens": 3, "seed": 0}


@dataclass
class LosslessArguments(ModelArguments):
    """What to serve and compare. The fields of `OnlineConfig` are flags too."""

    stream: str = option(
        "stdlib", string(), "JSONL files, datasets or built-in streams, comma-separated; see docs/recipes.md."
    )
    requests: int = option(200, whole(1), "Requests in total, taken from the streams in turn.")
    max_new_tokens: int = option(64, whole(2), "Longest answer, in tokens.")
    output_dir: str = option("runs/lossless", string(), "Folder for rows, summary and checkpoints.")
    resume: bool = option(False, switch(), "Continue the run in output_dir from its checkpoint.")
    overwrite: bool = option(False, switch(), "Start anew in place of the run in output_dir.")
    checkpoint_every: int = option(10, whole(1), "Requests between two checkpoints.")
    log_every: int = option(10, whole(1), "Requests between two lines of figures.")
    chat_template: bool = option(True, switch(), "Apply the tokenizer's chat template to prompts.")


def main(argv: list[str] | None = None) -> int:
    """Serve and compare; returns the exit status."""
    return run_command(LosslessArguments, lambda args, config: Job(args, config).run(), argv, DEFAULTS)


class Job:
    """One run; `run` reads from top to bottom."""

    def __init__(self, args: LosslessArguments, config: OnlineConfig):
        if not config.learns:
            raise ValueError("`learn` is off; leave it out, for outputs are compared while the draft learns.")
        self.args, self.config = args, config
        use_threads(args.threads)

    def run(self) -> int:
        """Serve, compare, and write the summary; returns the exit status."""
        args = self.args
        with RunFolder(args.output_dir, args.resume, args.overwrite) as folder:
            return self._run(folder)

    def _run(self, folder: RunFolder) -> int:
        args = self.args
        self.target, self.tokenizer = load_target(args.target, args.dtype)
        requests, skipped = self._load_requests()
        draft = load_draft(args.draft, self.target, any_vocabulary=True)
        self.tokenizers = draft_tokenizers(args.draft, draft, self.target, self.tokenizer)
        identity = self._identity(draft)
        assistant = OnlineAssistant(draft, self.config)
        log = RunLog(folder.path, identity, args.resume, name="lossless.jsonl")
        folder.clear()
        log.begin()
        if log.served:
            assistant.load_state(log.checkpoint)
        try:
            self._serve(assistant, requests, log)
        except KeyboardInterrupt:
            log.save(assistant)
            logger.warning("Interrupted: saved what was learnt and compared. Go on with --resume.")
            return 130
        summary = self._summary(assistant, log, skipped)
        write_json(folder.path / "summary.json", summary)
        log.save(assistant)
        for name, value in summary["overall"].items():
            print(f"{name:<25} {value:.4f}" if isinstance(value, float) else f"{name:<25} {value}")
        return 0 if summary["checks"]["no_mismatches"] else 1

    def _serve(self, assistant: OnlineAssistant, requests: list[dict], log: RunLog):
        """For each request in turn: generate with and without the draft, compare, then learn."""
        bar = tqdm(total=len(requests), initial=log.served, desc="comparing", unit="request", smoothing=0.05)
        for request in requests[log.served :]:
            prompt = request["ids"]
            plain_first = (
                log.served % 2 == 1
            )  # alternating, so that neither always runs on caches the other has warmed
            plain = self._answer(prompt) if plain_first else None
            assisted = self._answer(prompt, assistant_model=assistant, **self.tokenizers)
            if plain is None:
                plain = self._answer(prompt)
            verdict = compare_outputs(self.target, plain, assisted, prompt_length=len(prompt))
            found = {"id": request["id"], "verdict": verdict}
            if verdict != "identical":
                found |= first_difference(self.target, plain, assisted, len(prompt))
            assistant.update()
            row = log.add(request["domain"], assistant.stats, found)
            bar.update()
            if verdict == "mismatch":
                bar.write(f"{row['request']:>5} {shown(row['domain']):<14} MISMATCH  {dumps(found)}")
            if log.served % self.args.log_every == 0:
                figures = figures_of(log.rows)
                bar.write(
                    f"{row['request']:>5} {shown(row['domain']):<14} tokens {figures['tokens']}  identical {figures['identical']}  near-ties "
                    f"{figures['near_ties']}  mismatches {figures['mismatches']}  updates {row['updates']}"
                )
            if log.served % self.args.checkpoint_every == 0:
                log.try_to_save(assistant)
        bar.close()

    def _answer(self, prompt: Tensor, **kwargs) -> Tensor:
        return answer(self.target, prompt, self.args.max_new_tokens, **kwargs)

    def _load_requests(self) -> tuple[list[dict], dict[str, int]]:
        """Load the requests in serving order, and the number of skipped prompts by domain."""
        from recipes.common.prompts import load_streams

        args, streams, skipped, contents = self.args, [], {}, []
        for name, rows in load_streams(args.stream, self.config.seed):
            contents.append((name, content_of(rows)))
            random.Random(f"{self.config.seed or 0}:{name}").shuffle(rows)
            rows, skipped[name] = encode_rows(
                self.target, self.tokenizer, name, rows, args.max_new_tokens, args.chat_template
            )
            streams.append(rows)
        self.content = digest(contents)
        requests = in_turn(streams, args.requests)
        if len(requests) < args.requests:
            raise ValueError(
                f"`stream` has {len(requests)} prompts that fit the target's window: too few for --requests {args.requests}. Lower it, "
                "or name more streams."
            )
        return requests, skipped

    def _identity(self, draft: PreTrainedModel) -> dict:
        """Collect what must be the same for a run to be resumed; `requests` may be raised."""
        settings = {name: getattr(self.args, name) for name in ("max_new_tokens", "dtype")}
        settings |= {"stream": self.content, "target": print_of(self.target), "draft": print_of(draft)}
        template = self.tokenizer.chat_template if self.args.chat_template else None
        return settings | {"chat_template": digest(template), "config": self.config.to_dict()}

    def _summary(self, assistant: OnlineAssistant, log: RunLog, skipped: dict[str, int]) -> dict:
        stats = assistant.stats
        domains = {}
        for name in skipped:
            rows = [row for row in log.rows if row["domain"] == name]
            domains[name] = figures_of(rows) | {"skipped": skipped[name]}
        overall = figures_of(log.rows) | {
            "skipped": sum(skipped.values()),
            "updates": stats.updates,
            "failed_updates": stats.failed_updates,
        }
        return {
            "overall": overall,
            "checks": {
                "no_mismatches": overall["mismatches"] == 0,
                "no_failed_updates": overall["failed_updates"] == 0,
            },
            "domains": domains,
            "run": {
                "learned_tokens": stats.learned_tokens,
                "wall_s": log.wall,
                "seed": self.config.seed,
                **setting_of(self.target),
                "arguments": asdict(self.args),
                "config": self.config.to_dict(),
            },
        }


def in_turn(streams: list[list[dict]], count: int) -> list[dict]:
    """Take `count` rows from the streams in turn, skipping streams that have ended."""
    return list(islice((row for row in chain(*zip_longest(*streams)) if row is not None), count))


def first_difference(target, plain: Tensor, assisted: Tensor, prompt_length: int) -> dict:
    """Find where two outputs differ first, and the difference of the two candidates' logits there.

    Returns:
        `dict`: `differs_at`, an index among the new tokens; `logit_difference` by a fresh forward in the target's dtype; and
        `plain_logit_difference` in plain decoding itself.
    """
    shared = min(len(plain), len(assisted))
    differs = (plain[:shared] != assisted[:shared]).nonzero()
    if not len(differs):  # one goes on where the other ends
        return {"differs_at": shared - prompt_length, "logit_difference": None, "plain_logit_difference": None}
    at = int(differs[0])
    with torch.no_grad():
        fresh = target(input_ids=plain[None, :at].to(target.device), use_cache=False).logits[0, -1]
    again = target.generate(
        plain[None, :prompt_length].to(target.device),
        attention_mask=torch.ones(1, prompt_length, dtype=torch.long, device=target.device),
        max_new_tokens=at - prompt_length + 1,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    found = {"differs_at": at - prompt_length}
    for name, logits in (("logit_difference", fresh), ("plain_logit_difference", again.logits[-1][0])):
        found[name] = abs(float(logits[plain[at]]) - float(logits[assisted[at]]))
    return found


def figures_of(rows: list[dict]) -> dict:
    """Compute figures of these requests, named as in docs/figures.md; `alpha` is the mean over requests."""
    verdicts = [row["verdict"] for row in rows]
    sums = {name: sum(row[name] for row in rows) for name in ("new_tokens", "rounds", "drafted", "tested", "accepted")}
    tokens, near_ties = sums["new_tokens"], verdicts.count("near_tie")
    return {
        "requests": len(rows),
        "tokens": tokens,
        "identical": verdicts.count("identical"),
        "near_ties": near_ties,
        "mismatches": verdicts.count("mismatch"),
        "near_ties_per_10k_tokens": ratio(1e4 * near_ties, tokens),
        "alpha": mean([row["alpha"] for row in rows]),
        "alpha_live": ratio(sums["accepted"], sums["tested"]),
        "tokens_per_round": ratio(tokens, sums["rounds"]),
        "drafted": sums["drafted"],
        "accepted": sums["accepted"],
    }


if __name__ == "__main__":
    sys.exit(main())
