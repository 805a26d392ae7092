"""Serves a stream through `hf-osd sidecar` in front of a real vLLM, and measures what its draft learns, what its answers are, and what the way costs.

    python -m recipes.checks.sidecar --vllm_python vllm-env/bin/python --stream sql.jsonl --requests 300 --dtype bfloat16 --json sidecar.json

vLLM runs in an environment of its own, which docs/engines.md says how to make. Figures are written after each part, so that an interrupted run has those of the parts before.
"""

from __future__ import annotations

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from hf_osd import OnlineConfig
from hf_osd.engines.counters import Counted, read_counters
from hf_osd.models.properties import reads_states
from hf_osd.saving.drafts import save_draft
from hf_osd.saving.feature_drafts import layout_of
from hf_osd.system.bounds import option, switch, whole
from hf_osd.system.strict_json import dumps, write_json
from recipes.checks.sidecar_programs import Programs, free_port
from recipes.checks.sidecar_traffic import answers_alike, figures_of, live, seconds_a_token, settled
from recipes.common.command import run_command
from recipes.common.embedded import embedded_target
from recipes.common.models import EMBEDDED, ModelArguments, encode_rows, load_draft, load_target, use_threads
from recipes.common.options import optional_string, string
from recipes.common.prompts import load_stream, split_held_back

logger = logging.getLogger("hf_osd.recipes.sidecar")


@dataclass
class SidecarCheckArguments(ModelArguments):
    """What to serve, and how much of it. The fields of `OnlineConfig` are flags too, and the sidecar's."""

    vllm_python: str = option("", string(), "The Python of an environment that has vllm.")
    engines: int = option(1, whole(1), "How many vLLM servers stand behind the sidecar.")
    stream: str = option("stdlib", string(), "One stream; see docs/recipes.md.")
    requests: int = option(
        300, whole(1), "Live requests through the sidecar, each a prompt of the stream that is not held back."
    )
    at_once: int = option(2, whole(1), "Live requests under way at a time.")
    held_back: int = option(
        60, whole(1), "Held-back prompts, by which the engines' acceptance is measured before and after."
    )
    compared: int = option(200, whole(0), "Answers through the sidecar that are compared with an engine's own.")
    timed: int = option(40, whole(0), "Streamed answers of which the seconds a token are compared.")
    kill: bool = option(
        False,
        switch(),
        "While requests are live, kill the learner's process, the first engine and the sidecar; the last two are started again.",
    )
    max_new_tokens: int = option(64, whole(2), "Longest answer, in tokens.")
    gamma: int = option(4, whole(1), "Tokens drafted a round.")
    patience: int = option(
        600, whole(1), "Seconds to wait for an engine to come up, and for the last updates to be learnt and pushed."
    )
    vllm_args: str = option("", string(), "More arguments of the vLLM servers, separated by spaces.")
    sidecar_args: str = option("", string(), "More arguments of hf-osd sidecar, separated by spaces.")
    logs: str | None = option(
        None, optional_string(), "Folder for weights and the programs' logs, which is kept; else a temporary one."
    )
    json: str | None = option(None, optional_string(), "Also write the figures to this file.")
    overwrite: bool = option(False, switch(), "Replace the file of --json if there is one.")


def main(argv: list[str] | None = None) -> int:
    """Run the check; returns its exit status: 1 if a request failed, an answer was another, an engine ended, a prompt was found in a log, or
    nothing was learnt from. With `--kill` those in flight on what is killed may fail."""
    return run_command(SidecarCheckArguments, check, argv)


def check(args: SidecarCheckArguments, config: OnlineConfig) -> int:
    """Start engines and sidecar, send the stream, and print the figures as JSON."""
    use_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="hf_osd-sidecar-") as temporary:
        folder = Path(args.logs or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        held, stream, texts, facts = prepare(args, config, folder)
        figures: dict[str, Any] = {"arguments": asdict(args), **facts}
        with Programs(folder, args.patience) as programs:
            engines = [start_engine(args, programs, facts, folder / "draft", n) for n in range(args.engines)]
            for engine in engines:
                programs.wait_for(f"{engine}/health")
            sidecar = start_sidecar(args, config, programs, engines, facts["target"], folder)
            programs.wait_for(f"{sidecar}/status")
            measure(args, figures, programs, engines, sidecar, held, stream)
            figures["prompts_found"] = prompts_found(texts, folder, sidecar)
            figures["engines_ended"] = programs.ended("vllm")
    record(args, figures)
    print(dumps(figures, indent=2))
    failed = sum(figures[part]["failed"] for part in ("live", "alike") if part in figures)
    failed = max(0, failed - (2 * args.at_once if args.kill else 0))
    alike = figures.get("alike", {"different": 0})
    learnt = figures["status"]["counts"].get("taught", 0)
    wrong = (failed, alike["different"], figures["prompts_found"], figures["engines_ended"], not learnt)
    return int(any(wrong))


def prepare(args: SidecarCheckArguments, config: OnlineConfig, folder: Path):
    """Encode the prompts, and write the draft. Returns ids of the held-back prompts and of the stream's, their texts, and facts."""
    target, tokenizer = load_target(args.target, args.dtype)
    name, rows = load_stream(args.stream, config.seed)
    rows, _ = encode_rows(target, tokenizer, name, rows, args.max_new_tokens)
    held, rest = split_held_back(rows, args.held_back, config.seed or 0, name)
    if len(rest) < args.requests:
        raise ValueError(
            f"{name} has {len(rest)} prompts beside those held back; lower --requests from {args.requests} to that, or give another stream."
        )
    draft = load_draft(args.draft, target)
    save_draft(draft, folder / "draft", merge=True, layout="eagle3" if reads_states(draft) else "osd")
    tokenizer.save_pretrained(folder / "draft")
    dtype = str(target.dtype).removeprefix("torch.")
    where = str(embedded_target(dtype)) if args.target == EMBEDDED else args.target
    longest = max(512, *(len(row["ids"]) + args.max_new_tokens + args.gamma + 1 for row in rows))
    longest = min(longest, getattr(target.config.get_text_config(), "max_position_embeddings", longest))
    facts = {"target": where, "dtype": dtype, "window": longest, "stream": name}
    ids = [[row["ids"].tolist() for row in part] for part in (held, rest[: args.requests])]
    return *ids, [row["prompt"] for row in rows], facts


def start_engine(args: SidecarCheckArguments, programs: Programs, facts: dict, draft: Path, number: int) -> str:
    """Start a vLLM server; returns its URL."""
    port = free_port()
    method = "draft_model" if layout_of(draft) is None else "eagle3"
    speculative = {"method": method, "model": str(draft), "num_speculative_tokens": args.gamma}
    command = [
        args.vllm_python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        facts["target"],
        "--served-model-name",
        "target",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--seed", "0"]
    command += ["--max-model-len", str(facts["window"])]
    command += ["--dtype", args.dtype] if args.dtype != "auto" else []
    command += [
        "--worker-extension-cls",
        "hf_osd.engines.vllm.DraftRefresh",
        "--speculative-config",
        dumps(speculative),
    ]
    programs.start(f"vllm{number}", [*command, *args.vllm_args.split()], vllm=True)
    return f"http://127.0.0.1:{port}"


def start_sidecar(
    args: SidecarCheckArguments,
    config: OnlineConfig,
    programs: Programs,
    engines: list[str],
    target: str,
    folder: Path,
) -> str:
    """Start the sidecar with what this command was given of `OnlineConfig`; returns its URL."""
    port, usual = free_port(), OnlineConfig()
    changed = {
        f.name: getattr(config, f.name) for f in fields(config) if getattr(config, f.name) != getattr(usual, f.name)
    }
    (folder / "sidecar.yaml").write_text(dumps(changed), encoding="utf-8")  # JSON is YAML
    run = "import sys; from hf_osd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", run, "sidecar", "--engine", ",".join(engines), "--target", target]
    command += ["--draft", str(folder / "draft"), "--folder", str(folder / "pushed"), "--listen", f"127.0.0.1:{port}"]
    command += ["--config", str(folder / "sidecar.yaml")] if changed else []
    programs.start("sidecar", [*command, *args.sidecar_args.split()])
    return f"http://127.0.0.1:{port}"


def measure(
    args: SidecarCheckArguments,
    figures: dict,
    programs: Programs,
    engines: list[str],
    sidecar: str,
    held: list,
    stream: list,
):
    """Fill in the figures, part by part."""
    body = {"model": "target", "max_tokens": args.max_new_tokens, "temperature": 0}

    def done(part: str, value: Any):
        figures[part] = value
        record(args, figures)
        logger.info("%s: %s", part, dumps(value))

    with httpx.Client(timeout=httpx.Timeout(600.0)) as client:

        def acceptance() -> dict:
            """Answer the held-back prompts by the engines themselves: that teaches nothing."""
            counted = []
            for i, engine in enumerate(engines):
                before = read_counters(client, engine)
                for prompt in held[i :: len(engines)]:
                    answer = client.post(f"{engine}/v1/completions", json={**body, "prompt": prompt})
                    answer.raise_for_status()
                counted.append((read_counters(client, engine) or Counted()).since(before))
            each = [figures_of(one)["mean_acceptance_length"] for one in counted]
            return {**figures_of(sum(counted, Counted())), "mean_acceptance_length_by_engine": each}

        def timed(learns: bool) -> dict:
            """Compare the seconds a token through the sidecar with an engine's own, by turns."""
            headers = {} if learns else {"X-OSD-Private": "1"}
            pairs = []
            for i in range(args.timed):
                request = {**body, "prompt": held[i % len(held)], "stream": True, "ignore_eos": True}
                ways = [(engines[0], {}), (sidecar, headers)]
                seconds = {way[0]: seconds_a_token(client, *way, request) for way in (ways if i % 2 else ways[::-1])}
                pairs.append((seconds[engines[0]], seconds[sidecar]))
            own = statistics.median(own for own, _ in pairs)
            added = statistics.median(through - own for own, through in pairs)
            return {"pairs": len(pairs), "own_ms": 1e3 * own, "added_ms": 1e3 * added, "added_share": added / own}

        done("before", acceptance())
        began = time.perf_counter()
        events = killings(programs, engines[0], len(stream)) if args.kill else {}
        done("live", live(client, sidecar, stream, body, args.at_once, events, args.patience))
        for url in (*(f"{engine}/health" for engine in engines), f"{sidecar}/status"):
            programs.wait_for(url)
        done("settled", settled(client, sidecar, args.patience))
        figures["live"]["seconds"] = time.perf_counter() - began
        done("after", acceptance())
        if args.compared and len(engines) == 1:
            done("alike", answers_alike(client, engines[0], sidecar, held + stream, body, args.compared))
        if args.timed and len(engines) == 1:
            done("latency_private", timed(learns=False))
            done("latency", timed(learns=True))
        done("status", client.get(f"{sidecar}/status", headers={"accept": "application/json"}).json())
        figures["programs"] = programs.memory()


def killings(programs: Programs, engine: str, requests: int) -> dict[int, Callable[[], None]]:
    """Plan what is killed when which request is due."""

    def again(name: str):
        programs.kill(name)
        programs.start_again(name)

    def learner():
        programs.kill_child("hf_osd.remote", "sidecar")

    happens = {"the learner": learner, engine: partial(again, "vllm0"), "the sidecar": partial(again, "sidecar")}

    def told(what: str, event: Callable[[], None]):
        logger.info("Killing %s.", what)
        event()

    return {(i + 1) * requests // (len(happens) + 1): partial(told, *what) for i, what in enumerate(happens.items())}


def prompts_found(texts: list[str], folder: Path, sidecar: str) -> int:
    """Count prompts of which some line is in a log, in the sidecar's metrics or status, or in a file that it wrote."""
    shown = [httpx.get(f"{sidecar}{path}", timeout=60).text for path in ("/metrics", "/status")]
    small = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in (".safetensors", ".model") and "tokenizer" not in path.name
    ]
    shown += [
        path.read_text(encoding="utf-8", errors="replace")
        for path in small
        if path.name not in ("vocab.json", "merges.txt")
    ]
    written = "\n".join(shown)
    lines = [[line.strip() for line in text.splitlines() if len(line.strip()) >= 24] for text in texts]
    return sum(any(line in written for line in some) for some in lines)


def record(args: SidecarCheckArguments, figures: dict):
    """Write the figures so far."""
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    sys.exit(main())
