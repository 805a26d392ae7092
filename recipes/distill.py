"""The main job: serves streams of prompts through `generate` while the draft learns from them.

    accelerate launch recipes/distill.py --config recipes/configs/demo.yaml

With `--num_processes N` each process serves its share, and all learn one draft (docs/scale.md). Every key of the config is also a flag.
docs/recipes.md describes the flags and the files it writes. `Job.run` is the whole of it, in four steps.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run by its path: Python then looks in this folder, not in the one that holds `recipes`
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_osd import Feedback, OnlineAssistant, OnlineConfig, Rehearsal, compare_outputs
from hf_osd.drafting.vocab_mapping import VocabMapping, check_vocabularies
from hf_osd.feedback.prompt_states import SeenTexts
from hf_osd.remote.roles import LearningRank, serve_separately
from hf_osd.saving.feature_drafts import LAYOUTS, check_layout
from hf_osd.system.bounds import choice, option, switch, whole
from hf_osd.system.output_paths import check_apart
from recipes.common.answers import record_fitting, score_by_domain
from recipes.common.attempts import Saves, attempt_to_show
from recipes.common.command import check_repository, run_command
from recipes.common.comparison import BESIDE, CACHE, ONLINE, PLAIN, Comparison
from recipes.common.domains import Domain, load_domains, prints_of
from recipes.common.figures import cell, shown
from recipes.common.models import (
    EMBEDDED,
    EMBEDDED_FACTS,
    ModelArguments,
    draft_tokenizers,
    load_draft,
    load_target,
    use_threads,
)
from recipes.common.options import is_off, optional_string, sampling_temperature, string
from recipes.common.ranks import MODES, Processes
from recipes.common.report import RunReport, overall_of
from recipes.common.run_folder import DRAFT
from recipes.common.signals import check_signals, exit_status, hold_signals
from recipes.common.tracking import Tracking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger("hf_osd.recipes.distill")


@dataclass
class DistillArguments(ModelArguments):
    """Flags of the job itself; every field of `OnlineConfig` is a flag too."""

    stream: str = option(
        "",
        string(),
        "JSONL files with a field `prompt`, datasets or built-in streams, comma-separated; see docs/recipes.md.",
    )
    requests: int | None = option(None, whole(1).or_none(), "Requests to serve of each stream; all if left out.")
    held_back: int = option(
        100, whole(1), "Prompts of each stream that are never learnt; the draft is scored on them before and after."
    )
    shuffle: bool = option(False, switch(), "Serve each stream in a seeded random order instead of its own.")
    max_new_tokens: int = option(128, whole(2), "Longest answer, in tokens.")
    warm_up: int = option(
        0, whole(0), "Prompts of each stream that the target answers in batches, and the draft learns, before serving."
    )
    rehearse: float = option(
        0.0,
        sampling_temperature(),
        "After every update_interval requests let the target answer them again, sampled at this temperature, and learn that too. Stands for idle time.",
    )
    parity: int = option(
        15,
        whole(1),
        "Requests of each stream that are also decoded plainly and by the suffix cache alone, to compare outputs and speed.",
    )
    output_dir: str = option(
        "runs/distill", string(), "Folder for metrics, summary, curves, checkpoints and the draft."
    )
    layout: str = option(
        "osd",
        choice(*LAYOUTS),
        "How a draft that reads the target's hidden states is saved and pushed: as hf_osd has it, or as serving engines read it.",
    )
    push_to_hub: str | None = option(None, optional_string(), "Push the draft to this private repository at the end.")
    resume: bool = option(False, switch(), "Continue the run in output_dir from its checkpoint.")
    overwrite: bool = option(False, switch(), "Start anew in place of the run in output_dir.")
    checkpoint_every: int = option(25, whole(1), "Requests between two checkpoints.")
    save_buffer: bool = option(
        False, switch(), "Also save the feedback in checkpoints. It contains the prompts, as token ids."
    )
    log_every: int = option(10, whole(1), "Requests between two lines of figures.")
    batch_answers: int = option(
        8, whole(1), "Batch size for answers that are recorded: held-back prompts, warm-up, rehearsal."
    )
    chat_template: bool = option(True, switch(), "Apply the tokenizer's chat template to prompts.")
    mode: str = option(
        "together",
        choice(*MODES),
        "For several processes: 'together', all serve and learn, or 'separate', the last one learns for the others.",
    )
    sync_every: int = option(
        1, whole(1), "With mode 'together', requests of each process between two points at which all may learn."
    )
    weights_every: int = option(
        1, whole(1), "With mode 'separate', updates after which the new weights are sent to the processes that serve."
    )
    report_to: str = option("none", string(), "Trackers as in transformers' TrainingArguments, such as trackio.")

    def __post_init__(self):
        if not self.stream:
            raise ValueError(
                "`stream` is empty; name at least one JSONL file with a field `prompt`, such as --stream my.jsonl."
            )
        if is_off(self.report_to):
            self.report_to = "none"
        super().__post_init__()
        if self.push_to_hub is not None:
            check_repository(self.push_to_hub, self.target)
            if self.layout == "speculators" and Path(self.target).exists():
                raise ValueError(
                    f"`layout` is 'speculators', which names the target, and {self.target} is a folder of this machine; push with --layout eagle3."
                )


def main(argv: list[str] | None = None) -> int:
    """Run the job with these flags, those of the command line by default; returns the exit status."""
    return run_command(DistillArguments, _run, argv)


def _run(args: DistillArguments, config: OnlineConfig) -> int:
    job = Job(args, config)
    status, processes = job.run(), job.processes
    del job  # what has learnt together holds the process group
    processes.leave()
    return status


class Job:
    """One run of the job in this process; `run` reads from top to bottom."""

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

    def run(self) -> int:
        """Serve the streams while the draft learns, save, and report; returns the exit status."""
        if self.processes.learns_alone:
            return self._learn_for_others()
        args, processes = self.args, self.processes
        with processes.folder(args.output_dir, args.resume, args.overwrite) as self.folder:
            # 1. Find all that may be wrong, before anything in the folder is touched.
            self._load()
            self._record_held_back()
            processes.begin(self.folder, self.log)

            # 2. Begin: from a checkpoint, or with the draft as it came.
            if self.log.served:
                self.assistant.load_state(self.log.checkpoint)
            else:
                self._warm_up()
                self.log.before = score_by_domain(self.assistant, self.held_back)

            # 3. Serve, learn and save.
            interrupt = self._serve_and_save()
            hold_signals()

            # 4. Report the figures, and push.
            if processes.first:
                return self._finish(interrupt)
            self.assistant.close()
            return exit_status(interrupt) if interrupt else 0

    def _load(self):
        """Load target, streams and draft, and make the assistant; nothing is written."""
        args, processes = self.args, self.processes
        self.target, self.tokenizer = load_target(args.target, args.dtype, processes.accelerator.device, encoders=True)
        self.domains = load_domains(args, self.target, self.tokenizer, self.seed, processes.share)
        draft = load_draft(args.draft, self.target, any_vocabulary=True)
        self.facts = EMBEDDED_FACTS if args.target == EMBEDDED else {"target": args.target}
        self.layout = {"layout": args.layout}
        if args.layout == "speculators":
            self.layout["verifier"] = self.facts["target"]
        check_layout(draft, **self.layout)
        base = getattr(draft.config, "_name_or_path", "")
        check_apart({"--output_dir": self.folder.path / DRAFT}, {"--draft's base": base})
        # For generate; empty if the draft has the target's own tokens.
        self.tokenizers = draft_tokenizers(args.draft, draft, self.target, self.tokenizer)
        self.mapping = VocabMapping.from_models(self.target, draft, **self.tokenizers)
        check_vocabularies(self.target, self.mapping)
        self.draft_tokenizer = self.tokenizers.get("assistant_tokenizer", self.tokenizer)
        self.log = processes.open_log(self.folder, self._identity(draft), args.resume)
        self.assistant = OnlineAssistant(draft, self.config)
        if processes.roles is not None:
            serve_separately(self.assistant, processes.roles)
        self.comparison = Comparison(self.target, self.assistant, args.max_new_tokens, self.tokenizers)
        self.rehearsal = None
        if args.rehearse:
            self.rehearsal = Rehearsal(self.assistant, self.target, args.rehearse, batch_size=args.batch_answers)
        report_to = args.report_to if processes.first else "none"
        self.tracking = Tracking(report_to, args.output_dir, self.assistant.serving.active)

    def _identity(self, draft: PreTrainedModel) -> dict:
        """Collect what must be the same for a run to be resumed."""
        names = ("shuffle", "requests", "held_back", "warm_up", "rehearse", "max_new_tokens", "dtype")
        settings = {name: getattr(self.args, name) for name in names}
        settings |= prints_of(self.domains, self.target, draft, self.tokenizer, self.args.chat_template)
        return settings | {"config": self.config.to_dict() | {"seed": self.seed}}

    def _record_held_back(self):
        """Record the target's answers to the held-back prompts. The draft is the same on all ranks, so only the first one scores it."""
        domains = self.domains if self.processes.first else []
        self.held_back = {d.name: self._answers(d.held_back, f"{shown(d.name)}: held back") for d in domains}
        if without := [name for name, feedback in self.held_back.items() if not feedback]:
            raise ValueError(
                f"No held-back prompt of {', '.join(without)} fits the draft's window of {self.assistant.reach.window} tokens with its answer; choose "
                "another draft, or lower --max_new_tokens."
            )

    def _warm_up(self):
        """Distil offline, before the first request, on the target's own answers, in updates that are judged as those of serving are."""
        learner, config = self.assistant.learner, self.config
        if learner is None:
            return
        answers = [f for d in self.domains for f in self._answers(d.warm_up, f"{shown(d.name)}: warm-up")]
        seen, most = SeenTexts(), self.processes.serving.most(len(answers))
        for start in tqdm(range(0, most, config.update_interval), desc="warm-up", disable=not answers):
            for feedback in answers[start : start + config.update_interval]:
                learner.add(seen.only_new(feedback, config.prompt_positions))
            # A thread or process would otherwise begin late, with a single update of all answers, and no answers left to judge it by.
            self.assistant.update_together(force=config.learn in BESIDE)
        if most:
            self.processes.flush(self.assistant)

    def _answers(self, prompts: list[Tensor], what: str) -> list[Feedback]:
        args, show = self.args, self.processes.first
        sizes = args.max_new_tokens, args.batch_answers
        return record_fitting(self.target, self.assistant, self.mapping, prompts, *sizes, what, show)

    def _serve_and_save(self) -> KeyboardInterrupt | None:
        """Serve to the end or until a signal comes, and save what was learnt; returns the signal's exception, if one came."""
        processes, assistant = self.processes, self.assistant
        self.saves, self.drafts_identical = Saves(), None
        try:
            self._serve()
            self.log = processes.merge(self.log)
            processes.flush(assistant)
            self.drafts_identical = processes.same(dict(assistant.serving.weights()))
            self._save()
            if processes.first:
                self.log.after = score_by_domain(assistant, self.held_back)
        except KeyboardInterrupt as interrupt:
            hold_signals()
            logger.warning(
                "Interrupted: saving what was learnt.%s", "" if processes.several else " Go on with --resume."
            )
            # Other processes may be anywhere, and after SIGTERM or SIGHUP there may be little time.
            if not processes.several and exit_status(interrupt) == 130:
                assistant.flush()
            self._save()
            return interrupt
        return None

    def _serve(self):
        """Serve the requests of all streams in turn; after each the draft may learn."""
        todo = [(domain, i) for domain in self.domains for i in range(len(domain.requests))]
        first, served = self.processes.first, self.log.served
        with tqdm(
            total=len(todo), initial=served, desc="serving", unit="request", smoothing=0.05, disable=not first
        ) as bar:
            for step in range(served, self.processes.serving.most(len(todo))):
                if step >= len(todo):  # other ranks still serve, and learning takes all
                    self._update(step)
                    continue
                check_signals()
                self._serve_one(*todo[step], step)
                bar.update()
                if first and self.log.served % self.args.log_every == 0:
                    self._show_progress(bar)
                if first and self.log.served % self.args.checkpoint_every == 0:
                    self._checkpoint()

    def _serve_one(self, domain: Domain, i: int, step: int):
        """Serve the i-th request of a domain: generate, for a sample also plainly and by the suffix cache alone; learn, and log a row."""
        prompt, log, assistant = domain.requests[i], self.log, self.assistant
        pairs = evenly_spaced(len(domain.requests), self.args.parity)
        before = self.comparison.target_forwards
        found = self.comparison.decode(prompt, pairs.index(i) if i in pairs else None)
        output, decode_seconds = found[ONLINE]
        log.target_forwards += self.comparison.target_forwards - before
        start = time.perf_counter()
        self._update(step)
        learn_seconds = time.perf_counter() - start
        if self.rehearsal is not None and (step + 1) % self.config.update_interval == 0:
            self.rehearsal.run(self.config.update_interval, self.args.max_new_tokens)
        seconds = {"decode_seconds": decode_seconds, "learn_seconds": learn_seconds}
        log.add(domain.name, assistant.stats, seconds)
        if len(found) > 1:
            (plain_output, plain_seconds), (cache_output, cache_seconds) = found[PLAIN], found[CACHE]
            source = prompt if self.target.config.is_encoder_decoder else None
            verdict = compare_outputs(self.target, plain_output, output, source, len(prompt))
            begin = len(prompt) if source is None else 1
            tokens = {"new_tokens": len(output) - begin, "cache_tokens": len(cache_output) - begin}
            log.add_pair(domain.name, verdict, plain_seconds, decode_seconds, **tokens, cache_seconds=cache_seconds)

    def _update(self, step: int):
        """Learn if an update is due; several processes that learn together do so every `--sync_every` requests."""
        if self.processes.roles is not None or (step + 1) % self.args.sync_every == 0:
            self.assistant.update_together()

    def _show_progress(self, bar: tqdm):
        """Print a line of figures over the last requests, and pass them to the tracker."""
        row, figures = self.log.rows[-1], self.log.recent(self.args.log_every)
        alpha, tokens, speed = (cell(figures[name]) for name in ("alpha", "tokens_per_round", "tokens_per_second"))
        line = f"{row['request']:>5} {shown(row['domain']):<14} alpha {alpha}  tokens a round {tokens}  {speed} tok/s  updates {row['updates']}"
        attempt_to_show("a line of figures", bar.write, line)
        self.tracking.log(self.log.served, figures)

    def _checkpoint(self):
        """Save the run so far; several processes, which cannot be resumed, save their draft alone. A failure is logged, and serving goes on."""
        if not self.processes.several:
            self.log.try_to_save(self.assistant, self.args.save_buffer)
            return
        try:
            self.assistant.save_pretrained(self.folder.path / DRAFT, self.draft_tokenizer, **self.layout)
        except OSError as error:
            logger.error("%s. Serving goes on, and the draft is saved again at the next checkpoint.", error)

    def _save(self):
        """Save what could not be made again, checkpoint and draft; `saves` knows what failed."""
        self.saves = Saves()
        if not self.processes.several:
            self.saves.attempt(self.log.save, self.assistant, self.args.save_buffer)
        if self.processes.first:
            path = self.folder.path / DRAFT
            self.saves.attempt(self.assistant.save_pretrained, path, self.draft_tokenizer, self.facts, **self.layout)

    def _finish(self, interrupt: KeyboardInterrupt | None) -> int:
        """Write the figures, show them, and push the draft if asked to; returns the exit status."""
        assistant, folder, saves = self.assistant, self.folder, self.saves
        overall = overall_of(self.log, assistant, self.target, self.args)
        if self.processes.several:
            overall |= {"ranks": self.processes.serving.size, "drafts_identical": self.drafts_identical}
        skipped = {d.name: d.skipped for d in self.domains}
        report = RunReport(self.log, overall, skipped, {d.name: len(self.held_back[d.name]) for d in self.domains})
        facts = {**self.facts, "domains": report.summary["domains"]}
        if not interrupt:
            saves.attempt(report.write, folder.path)
        if not saves.errors:
            attempt_to_show("the card's figures", assistant.write_card, folder.path / DRAFT, facts)
        try:
            if interrupt:
                return exit_status(interrupt)
            attempt_to_show("curves.png", report.plot, folder.path)
            self.tracking.end()
            attempt_to_show("the table", print, report)
            attempt_to_show("the statistics", print, assistant.stats)
            saves.check()
            if self.args.push_to_hub is not None:
                assistant.push_to_hub(
                    self.args.push_to_hub, processing_class=self.draft_tokenizer, card=facts, **self.layout
                )
        finally:
            assistant.close()
        return 0

    def _learn_for_others(self) -> int:
        """Learn for the processes that serve, until they are done. The target is loaded only as long as a draft may be grown from it."""
        args = self.args
        target, _ = load_target(args.target, args.dtype, self.processes.accelerator.device, encoders=True)
        assistant = OnlineAssistant(load_draft(args.draft, target, any_vocabulary=True), self.config)
        del target
        LearningRank(assistant, self.processes.roles, args.weights_every).run()
        return 0


def evenly_spaced(count: int, sample: int) -> list[int]:
    """Choose `sample` indices below `count`, evenly spaced; all of them if there are fewer."""
    sample = min(sample, count)
    return [(2 * k + 1) * count // (2 * sample) for k in range(sample)]


if __name__ == "__main__":
    sys.exit(main())
