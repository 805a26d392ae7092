"""Runs the library's console command, `hf-osd`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    from hf_osd import __version__

    parser = argparse.ArgumentParser(prog="hf-osd", description="Online speculative decoding for Hugging Face.")
    parser.add_argument("--version", action="version", version=f"hf_osd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="check that hf_osd can work with the installed transformers")
    grow = commands.add_parser("grow", help="make a draft for a target that has none")
    grow.add_argument("target", help="path or Hub id of a causal LM")
    grow.add_argument("output", help="folder for the draft")
    grow.add_argument(
        "--kind",
        choices=("layers", "feature"),
        help="one new layer that reads the target's hidden states (the default), or some of the target's own layers (the default with --layers)",
    )
    grow.add_argument(
        "--layers",
        help="layers of the target, comma-separated: those that the draft is made of, with --kind layers by default 0,1; with --kind feature those after which "
        "it reads the target's states, by default three over the depth",
    )
    grow.add_argument(
        "--layout",
        choices=("osd", "eagle3", "speculators"),
        help="of --kind feature: as hf_osd has it (the default), or as serving engines read it",
    )
    grow.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output folder")
    grow.add_argument(
        "--choose",
        action="store_true",
        help="try several shapes, each distilled a little and timed on this machine, and write the one with the largest expected speed-up, distilled; "
        "in place of --kind and --layers",
    )
    grow.add_argument(
        "--prompts", help="of --choose: JSONL file with a field `prompt`; without it the target writes freely"
    )
    grow.add_argument("--minutes", type=float, default=10.0, help="of --choose: the time it may take, 10 by default")
    grow.add_argument(
        "--max_new_tokens", type=int, default=64, help="of --choose: longest answer, in tokens, 64 by default"
    )
    grow.add_argument("--seed", type=int, default=0, help="of --choose: of all that is drawn at random, 0 by default")
    grow.add_argument("--json", help="of --choose: also write the table to this file")
    commands.add_parser(
        "sidecar",
        add_help=False,
        help="stand in front of running vLLM servers, and teach their draft from their answers",
    )
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["sidecar"]:  # whose flags are those of a dataclass
        from hf_osd.engines.sidecar.command import main as sidecar

        return sidecar(given[1:])
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            return check()
        if args.choose:
            given = [name for name in ("kind", "layers", "layout") if getattr(args, name) is not None]
            if given:
                raise ValueError(
                    f"--choose chooses the shape itself; leave out {', '.join(f'--{name}' for name in given)}."
                )
            times = {"minutes": args.minutes, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
            return choose_to(args.target, args.output, args.prompts, args.overwrite, args.json, **times)
        kind = args.kind or ("layers" if args.layers else "feature")
        return grow_to(args.target, args.output, args.layers, args.overwrite, kind, args.layout or "osd")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"hf-osd: {error}", file=sys.stderr)
        return 2


def check() -> int:
    """Patch transformers and undo it again: the patch checks everything it relies on."""
    import torch
    import transformers

    from hf_osd.generation import patch

    patch.enable()
    patch.disable()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: hf_osd can work with these.")
    return 0


def grow_to(
    target: str,
    output: str,
    layers: str | None,
    overwrite: bool = False,
    kind: str = "feature",
    layout: str = "osd",
) -> int:
    """Grow a draft from `target`, and save it with the target's tokenizer into the folder `output`.

    Raises:
        OSError: if the target cannot be read or the output not be written.
        ValueError: if `layers` are no numbers or none of the target's, the output has a checkpoint already, it would overwrite the target, or the draft cannot be
            saved in the layout.
    """
    from transformers import AutoTokenizer

    from hf_osd.models.feature_growth import grow_feature_draft
    from hf_osd.saving.drafts import grow_draft, save_draft

    grow = grow_feature_draft if kind == "feature" else grow_draft
    try:
        picked = None if layers is None else [int(i) for i in layers.split(",")]
    except ValueError as error:
        raise ValueError(f"`--layers` is {layers!r}; write numbers with commas between, such as 0,1.") from error
    model = _loaded(target, output, overwrite)
    draft = grow(model, picked)
    tokenizer = AutoTokenizer.from_pretrained(target)
    of_layout = {"verifier": target} if layout == "speculators" else {}
    _write(output, tokenizer, lambda staging: save_draft(draft, staging, layout=layout, **of_layout))
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    print(f"{output}: {draft.num_parameters():,} parameters, {trained:,} of them to train.")
    return 0


def choose_to(
    target: str,
    output: str,
    prompts: str | None = None,
    overwrite: bool = False,
    json: str | None = None,
    minutes: float = 10.0,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> int:
    """Choose a draft for `target` out of several shapes, see [`hf_osd.shapes.choice.choose_shape`]; save it, distilled, with the target's tokenizer and its `OnlineConfig`, and
    print the table it was chosen from.

    Args:
        prompts: a JSONL file; `None` lets the target write freely.
        json: file for the table.
        minutes: that it may take, loading left out. A third of that is for the target's answers.

    Raises:
        OSError: if something cannot be read or written.
        ValueError: if a number is out of range, the prompts are malformed, or nothing can be grown from the target; and as `grow_to`.
    """
    from transformers import AutoTokenizer

    from hf_osd.config import OnlineConfig
    from hf_osd.saving.drafts import save_draft
    from hf_osd.shapes.answers import answers_within, encoded, free_prompts, read_prompts
    from hf_osd.shapes.card import card_of
    from hf_osd.shapes.choice import choose_shape, states_to_record
    from hf_osd.system.output_paths import check_apart, check_writable
    from hf_osd.system.strict_json import write_json

    if not 0 < minutes < float("inf") or max_new_tokens < 16 or seed < 0:
        raise ValueError("--minutes is to be above 0, --max_new_tokens 16 or more, --seed 0 or more.")
    texts = None if prompts is None else read_prompts(prompts, seed)
    if json is not None:
        check_apart({"--json": json}, {"the target": target, **({"--prompts": prompts} if prompts else {})})
        check_writable("--json", json)
    model, tokenizer = _loaded(target, output, overwrite), AutoTokenizer.from_pretrained(target)
    config, began = OnlineConfig(seed=seed), time.perf_counter()
    ids, held = (
        (free_prompts(model, tokenizer), None) if texts is None else encoded(texts, tokenizer, model, max_new_tokens)
    )
    answers = answers_within(
        model, ids, max_new_tokens, config, 20.0 * minutes, states_to_record(model), sampled=texts is None
    )
    count = None
    if held is not None:  # the last ones are held back
        count = sum(held[: len(answers)])
        answers = [one for _, one in sorted(zip(held, answers, strict=False), key=lambda pair: pair[0])]
    spent = time.perf_counter() - began
    print(f"{len(answers)} {'texts' if texts is None else 'answers'} of the target in {spent:.0f} s.", flush=True)
    choice = choose_shape(model, answers, config=config, seconds=max(60.0 * minutes - spent, 1.0), held_back=count)
    choice.facts.update(
        prompts="free" if texts is None else "given", minutes=minutes, seed=seed, recording_seconds=spent
    )

    def save(staging: Path):
        save_draft(choice.draft, staging)
        choice.config.save_pretrained(staging)
        (staging / "README.md").write_text(card_of(choice, target, staging), encoding="utf-8")

    _write(output, tokenizer, save)
    if json is not None:
        write_json(json, choice.to_dict())
    print(choice.table())
    for name, why in choice.left_out.items():
        print(f"left out: {name}: {why}")
    print(f"{output}: {choice.summary()}")
    return 0


def _loaded(target: str, output: str, overwrite: bool):
    """Load a target, once the output was found to be free, and apart from it."""
    from transformers import AutoModelForCausalLM

    from hf_osd.saving.drafts import files_of_checkpoint
    from hf_osd.system.output_paths import check_apart, check_writable

    check_apart({"the output": output}, {"the target": target})
    check_writable("The output", output, folder=True)
    if (found := files_of_checkpoint(output)) and not overwrite:
        raise ValueError(
            f"The output {output} has a checkpoint already ({found[0].name}); choose another folder, or pass --overwrite to replace it."
        )
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto").eval()
    check_apart({"the output": output}, {"the target's base": model.config._name_or_path})  # of an adapter
    return model


def _write(output: str, tokenizer, save: Callable[[Path], None]):
    """Write a draft by `save`, and the tokenizer, into a folder: whole, or not at all."""
    from hf_osd.saving.drafts import drop_older
    from hf_osd.system.files import staged

    with staged(output) as staging:
        save(staging)
        tokenizer.save_pretrained(staging)
        written = {path.name for path in staging.iterdir()}
    drop_older(output, written)
