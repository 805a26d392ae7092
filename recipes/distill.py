"""The main job: a stream of prompts served through `generate` while the draft learns from it.

    accelerate launch recipes/distill.py --config recipes/configs/demo.yaml

With `--num_processes N` each serves its share, and all learn one draft (docs/scale.md). Every key of the config is also a flag. What it writes is
described in docs/recipes.md. Logic that a library user would want is in hf_osd.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path, which has Python look in this folder and not in the one that holds `recipes`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_osd import Feedback, OnlineAssistant, OnlineConfig, Rehearsal, compare_outputs, record_answers
from hf_osd.drafting.vocab_mapping import VocabMapping, check_vocabularies
from hf_osd.feedback.prompt_states import SeenTexts
from hf_osd.remote.roles import LearningRank, serve_separately
from hf_osd.system.output_paths import check_apart
from recipes.common.command import check_numbers, check_repository, check_temperature, run_command
from recipes.common.domains import Domain, load_domains, prints_of
from recipes.common.models import (
    EMBEDDED,
    EMBEDDED_FACTS,
    ModelArguments,
    answer,
    draft_tokenizers,
    load_draft,
    load_target,
    use_threads,
)
from recipes.common.ranks import MODES, Processes
from recipes.common.report import RunReport, cell, shown
from recipes.common.run_folder import DRAFT, RunFolder
from recipes.common.run_log import RunLog, Tracking, or_none
from recipes.common.signals import check_signals, exit_status, hold_signals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("hf_osd.recipes.distill")


@dataclass
class DistillArguments(ModelArguments):
    """The job's own arguments; all others are those of `OnlineConfig`."""

    stream: str = field(
        default="", metadata={"help": "JSONL files (field `prompt`), comma-separated; see recipes/common/prompts.py."}
    )
    requests: int | None = field(default=None, metadata={"help": "Requests served a stream; all if left out."})
    held_back: int = field(
        default=100, metadata={"help": "Prompts a stream kept from learning, scored before and after."}
    )
    shuffle: bool = field(default=False, metadata={"help": "Serve each stream in a seeded random order, not its own."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest answer, in tokens."})
    warm_up: int = field(
        default=0, metadata={"help": "Prompts a stream answered in batches and learnt before serving."}
    )
    rehearse: float = field(
        default=0.0,
        metadata={
            "help": "A temperature: after every update_interval requests answer them again at it, and learn that too, as in idle time."
        },
    )
    parity: int = field(default=15, metadata={"help": "Requests a stream that are also decoded plainly, interleaved."})
    output_dir: str = field(default="runs/distill", metadata={"help": "Where metrics, summary, curves and draft go."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Push the draft to this repository, privately."})
    resume: bool = field(default=False, metadata={"help": "Go on from the checkpoint in the output directory."})
    overwrite: bool = field(
        default=False, metadata={"help": "Start anew in place of the run in the output directory."}
    )
    checkpoint_every: int = field(default=25, metadata={"help": "Requests between two checkpoints."})
    save_buffer: bool = field(
        default=False, metadata={"help": "Keep the feedback, which holds the prompts, in checkpoints."}
    )
    log_every: int = field(default=10, metadata={"help": "Requests between two lines of figures."})
    batch_answers: int = field(default=8, metadata={"help": "Prompts a batch where answers are recorded, not served."})
    chat_template: bool = field(default=True, metadata={"help": "Put prompts through the tokenizer's chat template."})
    mode: str = field(
        default="together",
        metadata={
            "help": f"Of several processes, {' or '.join(MODES)}: all serve and learn, or the last learns for the others."
        },
    )
    sync_every: int = field(
        default=1, metadata={"help": "Requests of each process between two points at which all may learn together."}
    )
    weights_every: int = field(
        default=1,
        metadata={"help": "Updates after which the weights go to those that serve, where one process learns."},
    )
    report_to: str = field(default="none", metadata={"help": "Trackers of transformers' Trainer, such as trackio."})

    def __post_init__(self):
        if not self.stream:
            raise ValueError(
                "`stream` is empty; name at least one JSONL file with a field `prompt`, such as --stream my.jsonl."
            )
        if str(self.report_to).lower() in ("none", "false", "no", "off"):  # as config files write it
            self.report_to = "none"
        super().__post_init__()
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub, self.target)
        least = {"requests": 1, "held_back": 1, "max_new_tokens": 2, "warm_up": 0, "parity": 1, "checkpoint_every": 1}
        least |= {"log_every": 1, "batch_answers": 1, "threads": 1, "sync_every": 1, "weights_every": 1}
        check_numbers(self, least)
        check_temperature(self, "rehearse")


def main(argv: list[str] | None = None) -> int:
    """Run the job; the exit status."""
    return run_command(DistillArguments, lambda args, config: Job(args, config).run(), argv)


class Job:
    """One run: `run` reads from top to bottom."""

    def __init__(self, args: DistillArguments, config: OnlineConfig):
        self.args, self.config = args, config
        self.processes = Processes(args.mode)
        if self.processes.several and config.learn not in ("inline", "off"):
            raise ValueError(
                f"`learn` is {config.learn!r}, with which each of several processes would learn a draft of its own; leave it at 'inline'."
            )
        use_threads(args.threads, self.processes.beside)
        self.seed = config.seed if config.seed is not None else 0
        torch.manual_seed(self.seed)
        self.target_forwards = 0

    def run(self) -> int:
        if self.processes.learns_alone:
            return self._learn()
        args = self.args
        with self.processes.folder(args.output_dir, args.resume, args.overwrite) as folder:
            return self._run(folder)

    def _run(self, folder: RunFolder) -> int:
        # 1. All that may be wrong is found before anything is done or touched.
        args, processes = self.args, self.processes
        self.target, self.tokenizer = load_target(args.target, args.dtype, processes.accelerator.device, encoders=True)
        domains = load_domains(args, self.target, self.tokenizer, self.seed, processes.share)
        draft = load_draft(args.draft, self.target, any_vocabulary=True)
        check_apart(
            {"--output_dir": folder.path / DRAFT}, {"--draft's base": getattr(draft.config, "_name_or_path", "")}
        )
        # For generate, and nothing where the draft's tokens are the target's.
        self.tokenizers = draft_tokenizers(args.draft, draft, self.target, self.tokenizer)
        self.translation = VocabMapping.of_models(self.target, draft, **self.tokenizers)
        check_vocabularies(self.target, self.translation)
        self.draft_tokenizer = self.tokenizers.get("assistant_tokenizer", self.tokenizer)
        log = processes.open_log(folder, self._identity(domains, draft), args.resume)
        assistant = OnlineAssistant(draft, self.config)
        self.reach = assistant.reach
        if processes.roles is not None:
            serve_separately(assistant, processes.roles)
        if args.rehearse:
            Rehearsal(assistant, self.target, args.rehearse)  # what cannot be is said before any work
        tracking = Tracking(args.report_to if processes.first else "none", args.output_dir, assistant.serving.active)
        self.target.register_forward_pre_hook(self._count_forward)

        # The draft is the same everywhere: one rank says how it does.
        judged = domains if processes.first else []
        held_back = {d.name: self._answers(d.held_back, f"{shown(d.name)}: held back") for d in judged}
        if without := [name for name, feedback in held_back.items() if not feedback]:
            raise ValueError(
                f"No held-back prompt of {', '.join(without)} fits the draft's window of {self.reach.window} tokens with its answer; choose another draft, "
                "or lower --max_new_tokens."
            )
        processes.begin(folder, log)

        # 2. Serve.
        if log.served:
            assistant.load_state(log.checkpoint)
        else:
            self._warm_up(assistant, domains)
            log.before = self._alphas(assistant, held_back)
        facts = EMBEDDED_FACTS if args.target == EMBEDDED else {"target": args.target}
        interrupted = same = None
        unsaved: list[Exception] = []
        try:
            self._serve(assistant, domains, log, tracking)
            log = processes.merge(log)
            processes.flush(assistant)
            same = processes.same(dict(assistant.serving.weights()))
            self._save_work(unsaved, assistant, log, folder, facts)
            if processes.first:
                log.after = self._alphas(assistant, held_back)
        except KeyboardInterrupt as interrupt:
            interrupted = interrupt
            hold_signals()
            logger.warning(
                "Interrupted: saving what was learnt.%s", "" if processes.several else " Go on with --resume."
            )
            # Of several processes the others may be anywhere; and after any other signal than Ctrl-C there may be little time.
            if not processes.several and exit_status(interrupt) == 130:
                assistant.flush()
            self._save_work(unsaved, assistant, log, folder, facts)
        hold_signals()
        if not processes.first:
            assistant.close()
            return exit_status(interrupted) if interrupted else 0

        # 3. The figures.
        overall = self._overall(assistant, log)
        if processes.several:
            overall |= {"ranks": processes.serving.size, "drafts_identical": same}
        report = RunReport(
            log,
            overall,
            {d.name: d.skipped for d in domains},
            {d.name: len(held_back.get(d.name, ())) for d in domains},
        )
        facts = {**facts, "domains": report.summary["domains"]}
        if not interrupted:
            _save(unsaved, report.write, folder.path)

        # 4. The rest is to look at, but for the push.
        if not unsaved:
            _try("the card's figures", assistant.write_card, folder.path / DRAFT, facts)
        if interrupted:
            assistant.close()
            return exit_status(interrupted)
        _try("curves.png", report.plot, folder.path)
        tracking.end()
        _try("the table", print, report)
        _try("the statistics", print, assistant.stats)
        try:
            if unsaved:
                raise unsaved[0]
            if args.push_to_hub is not None:
                assistant.push_to_hub(args.push_to_hub, processing_class=self.draft_tokenizer, card=facts)
        finally:
            assistant.close()
        return 0

    def _save_work(
        self, unsaved: list[Exception], assistant: OnlineAssistant, log: RunLog, folder: RunFolder, facts: dict
    ):
        """Save what cannot be had again, each whatever becomes of the others; what could not be is in `unsaved`."""
        unsaved.clear()
        if not self.processes.several:
            _save(unsaved, log.save, assistant, self.args.save_buffer)
        if self.processes.first:
            _save(unsaved, assistant.save_pretrained, folder.path / DRAFT, self.draft_tokenizer, facts)

    def _learn(self) -> int:
        """Learn for those that serve. The target is here for as long as a draft may have to be made of it."""
        args = self.args
        target, _ = load_target(args.target, args.dtype, self.processes.accelerator.device, encoders=True)
        assistant = OnlineAssistant(load_draft(args.draft, target, any_vocabulary=True), self.config)
        del target
        LearningRank(assistant, self.processes.roles, args.weights_every).run()
        return 0

    def _serve(self, assistant: OnlineAssistant, domains: list[Domain], log: RunLog, tracking: Tracking):
        """Each request in turn: generate, on a sample plainly too, then learn."""
        todo = [(domain, i) for domain in domains for i in range(len(domain.requests))]
        hidden = not self.processes.first
        rehearsal = None
        if self.args.rehearse:
            rehearsal = Rehearsal(assistant, self.target, self.args.rehearse, batch_size=self.args.batch_answers)
        bar = tqdm(total=len(todo), initial=log.served, desc="serving", unit="request", smoothing=0.05, disable=hidden)
        for step in range(log.served, self.processes.serving.most(len(todo))):
            if step >= len(todo):  # others still serve: take part in what they learn
                self._update(assistant, step)
                continue
            check_signals()
            domain, i = todo[step]
            prompt = domain.requests[i]
            pairs = _spread(len(domain.requests), self.args.parity)
            plain_first = i in pairs and pairs.index(i) % 2 == 1
            plain = self._generate(prompt) if plain_first else None
            before = self.target_forwards - assistant.stats.total.verification_forwards
            output, decode_seconds = self._generate(prompt, assistant_model=assistant, **self.tokenizers)
            log.target_forwards += self.target_forwards - assistant.stats.total.verification_forwards - before
            if i in pairs and not plain_first:
                plain = self._generate(prompt)
            learning = time.perf_counter()
            self._update(assistant, step)
            learn_seconds = time.perf_counter() - learning
            if rehearsal is not None and (step + 1) % self.config.update_interval == 0:
                rehearsal.run(self.config.update_interval, self.args.max_new_tokens)
            seconds = {"decode_seconds": decode_seconds, "learn_seconds": learn_seconds}
            row = log.add(domain.name, assistant.stats, seconds)
            if plain is not None:
                source = prompt if self.target.config.is_encoder_decoder else None
                verdict = compare_outputs(self.target, plain[0], output, source)
                log.add_pair(domain.name, verdict, plain[1], decode_seconds)
            bar.update()
            if hidden:
                continue
            if log.served % self.args.log_every == 0:
                figures = log.recent(self.args.log_every)
                alpha, tokens, speed = (
                    cell(figures[name]) for name in ("alpha", "tokens_per_round", "tokens_per_second")
                )
                line = f"{row['request']:>5} {shown(domain.name):<14} alpha {alpha}  tokens a round {tokens}  {speed} tok/s  updates {row['updates']}"
                _try("a line of figures", bar.write, line)
                tracking.log(log.served, figures)
            if log.served % self.args.checkpoint_every == 0:
                if self.processes.several:
                    try:
                        assistant.save_pretrained(Path(self.args.output_dir) / DRAFT, self.draft_tokenizer)
                    except OSError as error:
                        logger.error(
                            "%s. Serving goes on, and the draft is saved again at the next checkpoint.", error
                        )
                else:
                    log.try_to_save(assistant, self.args.save_buffer)
        bar.close()

    def _update(self, assistant: OnlineAssistant, step: int):
        if self.processes.roles is not None or (step + 1) % self.args.sync_every == 0:
            assistant.update_together()

    def _generate(self, prompt: Tensor, **kwargs) -> tuple[Tensor, float]:
        start = time.perf_counter()
        output = answer(self.target, prompt, self.args.max_new_tokens, **kwargs)
        return output, time.perf_counter() - start

    def _warm_up(self, assistant: OnlineAssistant, domains: list[Domain]):
        """Offline distillation on the target's own answers, before the first request: as requests that were served, judged before they are learnt."""
        if assistant.learner is None:
            return
        answers = [f for d in domains for f in self._answers(d.warm_up, f"{shown(d.name)}: warm-up")]
        interval, known = self.config.update_interval, SeenTexts()
        most = self.processes.serving.most(len(answers))
        for start in tqdm(range(0, most, interval), desc="warm-up", disable=not answers):
            for feedback in answers[start : start + interval]:
                assistant.learner.add(known.only_new(feedback, self.config.prompt_positions))
            # Beside serving it would all be one update by the time that one begins, and what that learns not be judged.
            assistant.update_together(force=self.config.learn in ("background", "process"))
        if most:
            self.processes.flush(assistant)

    def _answers(self, prompts: list[Tensor], what: str) -> list[Feedback]:
        """In the draft's tokens, without those that are longer than its window."""
        hidden = not prompts or not self.processes.first
        with tqdm(total=len(prompts), desc=what, unit="prompt", disable=hidden) as bar:
            answers = record_answers(
                self.target,
                prompts,
                self.args.max_new_tokens,
                batch_size=self.args.batch_answers,
                top_k=self.config.top_k,
                dtype=getattr(torch, self.config.feedback_dtype),
                prompt_positions=self.config.prompt_positions,
                on_batch=bar.update,
                translation=self.translation,
            )
        fitting = [feedback for feedback in answers if self.reach.covers(feedback)]
        if longer := len(answers) - len(fitting):
            logger.warning(
                "%s: left out %d answers longer than the draft's window of %s.", what, longer, self.reach.window
            )
        return fitting

    def _identity(self, domains: list[Domain], draft: PreTrainedModel) -> dict:
        """What must be the same for a run to be resumed."""
        names = ("shuffle", "requests", "held_back", "warm_up", "rehearse", "max_new_tokens", "dtype")
        settings = {name: getattr(self.args, name) for name in names}
        settings |= prints_of(domains, self.target, draft, self.tokenizer, self.args.chat_template)
        return settings | {"config": self.config.to_dict() | {"seed": self.seed}}

    def _alphas(self, assistant: OnlineAssistant, held_back: dict[str, list[Feedback]]) -> dict[str, float | None]:
        """α of each domain on prompts that nobody learns from; `None` where it cannot be had."""
        found = {}
        for name, feedback in held_back.items():
            try:
                found[name] = or_none(float(torch.cat(assistant.score(feedback)).nanmean()))
            except Exception:  # out of memory, say: a figure less, and no reason to lose the others
                logger.exception("%s: α on the held-back prompts could not be had.", name)
                found[name] = None
        return found

    def _overall(self, assistant: OnlineAssistant, log: RunLog) -> dict:
        stats = assistant.stats
        return {
            "target_forwards": log.target_forwards,
            "rounds": sum(row["rounds"] for row in log.rows),
            "updates": stats.updates,
            "failed_updates": stats.failed_updates,
            "rejected_updates": stats.rejected_updates,
            "accepted_updates": stats.accepted_updates,
            "regret_vs_static": stats.regret_vs_static,
            "learning_rate": stats.learning_rate,
            "learned_tokens": stats.learned_tokens,
            "learning_seconds": stats.learning_seconds,
            "longest_update_s": stats.longest_update,
            "wall_s": log.wall,
            "seed": self.config.seed,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "device": str(self.target.device.type),
            "arguments": asdict(self.args),
        }

    def _count_forward(self, module, inputs):
        self.target_forwards += 1


def _save(unsaved: list[Exception], save: Callable, *args):
    """Call `save`; what it raises is noted for the end, for there is more to save."""
    try:
        save(*args)
    except Exception as error:
        logger.error("%s", error)
        unsaved.append(error)


def _try(what: str, show: Callable, *args):
    """Call `show`, which is for those who look and for nothing else: what it raises is a warning."""
    try:
        show(*args)
    except Exception as error:
        logger.warning("Left out: %s (%r).", what, error)


def _spread(count: int, sample: int) -> list[int]:
    """`sample` indices spread evenly over `count`."""
    sample = min(sample, count)
    return [(2 * k + 1) * count // (2 * sample) for k in range(sample)]


if __name__ == "__main__":
    sys.exit(main())
