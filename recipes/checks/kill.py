"""Repeatedly kills a service that learns, with SIGKILL, and checks what is on disk after each kill.

    python -m recipes.checks.kill --kills 100 --output_dir runs/kill

A child process serves an endless stream on a tiny random model and checkpoints every few requests, as recipes/distill.py does. It is killed after a
random delay, every other time within a save. Then another process loads what is there into a fresh assistant and compares it with what was served,
and the next child goes on from it. The exit status is 1 if any state was corrupt or more than one interval was lost. Needs POSIX.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_osd import OnlineAssistant, OnlineConfig, grow_draft
from hf_osd.system.bounds import check_options, number, option, switch, whole
from hf_osd.system.files import newest_state, states
from hf_osd.system.strict_json import write_json
from recipes.common.options import string
from recipes.common.run_folder import RunFolder
from recipes.common.run_log import METRICS, RunLog

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaForCausalLM

logger = logging.getLogger("hf_osd.recipes.kill")

VOCAB, PROMPT, ANSWER = 64, 6, 12
# Answers depend only on what a restart keeps, not on clocks or on feedback that is not saved, so that the rows of a killed run can be compared with those of
# a run that was not killed.
CONFIG = {
    "lookahead": "constant",
    "num_assistant_tokens": 3,
    "suffix_cache": False,
    "update_interval": 2,
    "batch_size": 8,
    "replay_ratio": 0.0,
    "gate": False,
    "learning_rate": 1e-3,
    "learning_budget": 1.0,
    "seed": 0,
}
SAVING, SAVED = b"s", b"e"  # bytes that a child sends as a save begins and ends


@dataclass
class KillArguments:
    """How often to kill, and where to write."""

    kills: int = option(100, whole(1), "How often the child is killed.")
    seed: int = option(0, whole(0), "Seed of the delays.")
    longest: float = option(0.6, number(0), "Longest time from a child's first request to its kill, in seconds.")
    checkpoint_every: int = option(
        4, whole(1), "Requests between two checkpoints, which is the interval that a kill may lose."
    )
    compare: bool = option(True, switch(), "Also serve the same requests without a kill, and compare the rows.")
    output_dir: str = option("runs/kill", string(), "Folder for rows, states and summary.")
    overwrite: bool = option(False, switch(), "Start anew in place of the run in output_dir.")

    def __post_init__(self):
        check_options(self)
        if self.checkpoint_every % CONFIG["update_interval"]:
            raise ValueError(
                f"`checkpoint_every` is {self.checkpoint_every}; give a multiple of {CONFIG['update_interval']}, the requests of an update, or "
                "a kill loses feedback that waits to be learnt."
            )


def main(argv: list[str] | None = None) -> int:
    """Kill and check; returns the exit status."""
    from transformers import HfArgumentParser

    from hf_osd import OnlineGKDTrainer  # noqa: F401 (imported here, or each fork would spend seconds on it)

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(1)
    try:
        [args] = HfArgumentParser(KillArguments).parse_args_into_dataclasses(argv)
        with RunFolder(args.output_dir, overwrite=args.overwrite):
            return Killing(args).run()
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        return 2


class Killing:
    """One run of all kills; `run` reads from top to bottom."""

    def __init__(self, args: KillArguments):
        self.args, self.directory = args, Path(args.output_dir) / "service"
        self.random = random.Random(args.seed)
        self.save_seconds = 0.02  # duration of the last save that was not killed
        RunLog(self.directory, identity(args)).begin()  # afresh

    def run(self) -> int:
        """Kill as often as asked, checking after each kill, and write the summary; returns the exit status."""
        kills, known, start = [], [], time.perf_counter()
        for i in range(self.args.kills):
            in_save = self._serve_and_kill(aim_at_save=i % 2 == 1)
            kill = self._check_disk(known) | {"in_save": in_save}
            kills.append(kill)
            known = kill.pop("rows")
            print(
                f"kill {i + 1:>3}  {'in a save' if in_save else 'serving  '}  served {kill['served']:>5}  saved {kill['saved']:>5}  lost "
                f"{kill['lost']:>2}  left over {kill['left_over']}  {kill['corrupt'] or 'whole'}",
                flush=True,
            )
        summary = self._summary(kills) | {"wall_s": time.perf_counter() - start}
        if self.args.compare:
            summary["differs_at"] = self._differs_at(known)
        facts = {"summary": summary, "kills": kills, "config": CONFIG}
        write_json(Path(self.args.output_dir) / "kills.json", facts)
        for name, value in summary.items():
            print(f"{name:<22} {value:.1f}" if isinstance(value, float) else f"{name:<22} {value}")
        failed = summary["corrupt"] or summary["most_lost"] > self.args.checkpoint_every
        return 1 if failed or summary.get("differs_at") is not None else 0

    def _serve_and_kill(self, aim_at_save: bool) -> bool:
        """Start a child, let it serve, and kill it; returns whether the kill came within a save."""
        with forked(lambda send: serve(self.args, self.directory, send)) as (child, messages):
            sent = messages.wait(SAVING)  # the beginning of its first save: it is ready
            delay = self.random.uniform(0, self.args.longest)
            if aim_at_save:
                for _ in range(self.random.randrange(1, 4)):
                    began = time.perf_counter()
                    sent += messages.wait(SAVED)
                    self.save_seconds = time.perf_counter() - began
                    sent += messages.wait(SAVING)
                delay = self.random.uniform(0, self.save_seconds)
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            sent += messages.rest()
        return sent.endswith(SAVING)

    def _check_disk(self, known: list[dict]) -> dict:
        """Check in another process what is on disk."""
        with forked(lambda send: send(json.dumps(check_disk(self.args, self.directory, known)).encode())) as (
            _,
            messages,
        ):
            return json.loads(messages.rest())

    def _differs_at(self, rows: list[dict]) -> int | None:
        """Find the first request at which a run without kills has another row; `None` if there is none."""
        straight = Path(self.args.output_dir) / "straight"
        RunLog(straight, identity(self.args)).begin()
        with forked(lambda send: serve(self.args, straight, send, requests=len(rows))) as (_, messages):
            messages.rest()
        whole = [json.loads(line) for line in (straight / METRICS).read_text().splitlines()]
        return next((row["request"] for row, other in zip(rows, whole, strict=True) if row != other), None)

    def _summary(self, kills: list[dict]) -> dict:
        return {
            "kills": len(kills),
            "in_a_save": sum(kill["in_save"] for kill in kills),
            "with_leftovers": sum(kill["left_over"] > 0 for kill in kills),
            "corrupt": sum(kill["corrupt"] is not None for kill in kills),
            "requests": kills[-1]["saved"],
            "interval": self.args.checkpoint_every,
            "most_lost": max(kill["lost"] for kill in kills),
            "lost": sum(kill["lost"] for kill in kills),
        }


def serve(args: KillArguments, directory: Path, send: Callable[[bytes], None], requests: int | None = None):
    """Serve as the child: go on from what is on disk, for ever or up to a number of requests."""
    log = RunLog(directory, identity(args), resume=True).begin()
    target, assistant = make_models()
    if states(log.checkpoint):
        assistant.load_state(log.checkpoint)
    save = type(assistant).save_state

    def saving(*arguments, **kwargs):
        send(SAVING)
        save(assistant, *arguments, **kwargs)
        send(SAVED)

    assistant.save_state = saving
    log.save(assistant)
    while requests is None or log.served < requests:
        input_ids = prompt(log.served)
        target.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            assistant_model=assistant,
            max_new_tokens=ANSWER,
            do_sample=False,
        )
        assistant.update()
        log.add("random", assistant.stats, {"learned_tokens": assistant.stats.learned_tokens})
        if log.served % args.checkpoint_every == 0:
            log.save(assistant)


def check_disk(args: KillArguments, directory: Path, known: list[dict]) -> dict:
    """Load what is on disk into a fresh assistant, and check that it agrees with itself and with the rows `known` before."""
    checkpoint, written = directory / "checkpoint", (directory / METRICS).read_bytes()
    left_over = len(list(checkpoint.glob(".staged-*")))
    facts = {"served": written.count(b"\n"), "saved": 0, "lost": 0, "left_over": left_over, "rows": known}
    try:
        if newest_state(checkpoint) != states(checkpoint)[0]:
            raise ValueError("the newest state is passed over")
        _, assistant = make_models()
        progress = assistant.load_state(checkpoint)
        rows = facts["rows"] = [json.loads(line) for line in written[: progress["bytes"]].splitlines()]
        facts |= {"saved": len(rows), "lost": facts["served"] - len(rows)}
        stats, last = assistant.stats, rows[-1] if rows else {"updates": 0, "learned_tokens": 0}
        for what, one, other in (
            ("requests in rows and position", len(rows), progress["rows"]),
            ("requests in rows and statistics", len(rows), stats.total.requests),
            ("tokens in rows and statistics", sum(row["new_tokens"] for row in rows), stats.total.new_tokens),
            ("updates in rows and learner", last["updates"], stats.updates),
            ("learnt tokens in rows and learner", last["learned_tokens"], stats.learned_tokens),
            ("rows that were saved before", rows[: len(known)], known),
            ("whether all weights are finite", all(p.isfinite().all() for _, p in assistant.serving.weights()), True),
        ):
            if one != other:
                raise ValueError(f"{what}: {one} is not {other}")
        corrupt = None
    except Exception as error:  # whatever it is, a restart would have failed with it
        corrupt = f"{type(error).__name__}: {error}"
    return facts | {"corrupt": corrupt}


def make_models() -> tuple[LlamaForCausalLM, OnlineAssistant]:
    """Make the target, and an assistant with a draft grown from it, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # the usual 0.02 makes nearly flat distributions, and greedy answers that repeat
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    target = LlamaForCausalLM(config).eval()
    return target, OnlineAssistant(grow_draft(target, (0, -1)), OnlineConfig(**CONFIG))


def prompt(number: int) -> Tensor:
    """Make the prompt of this number, int64 `(1, 6)`."""
    return torch.randint(2, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(number))


def identity(args: KillArguments) -> dict:
    """Collect what a resumed run must have begun with."""
    return {"checkpoint_every": args.checkpoint_every, "config": CONFIG}


class Messages:
    """Reads what a child sends through a pipe."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def wait(self, until: bytes) -> bytes:
        """Read up to the byte `until`; raises `RuntimeError` if the child ends before it."""
        sent = b""
        while not sent.endswith(until):
            if not (byte := os.read(self._descriptor, 1)):
                raise RuntimeError("The child ended by itself; its error is in the log above.")
            sent += byte
        return sent

    def rest(self) -> bytes:
        """Read up to the child's end."""
        parts = []
        while part := os.read(self._descriptor, 2**16):
            parts.append(part)
        return b"".join(parts)


@contextlib.contextmanager
def forked(work: Callable[[Callable[[bytes], None]], None]) -> Iterator[tuple[int, Messages]]:
    """Fork a child that calls `work(send)`; yields its process id and what it sends, and ends it afterwards. A fork needs no imports."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reading)
            work(lambda sent: os.write(writing, sent) and None)
            status = 0
        except BaseException:
            logger.exception("A child failed.")
        finally:
            os._exit(status)
    os.close(writing)
    try:
        yield child, Messages(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)  # also if it has ended: its process id is valid until waited for
        os.waitpid(child, 0)


if __name__ == "__main__":
    sys.exit(main())
