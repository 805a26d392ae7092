"""`hf-osd`: a thin console entry over the library."""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status."""
    from hf_osd import __version__

    parser = argparse.ArgumentParser(prog="hf-osd", description="Online speculative decoding for Hugging Face.")
    parser.add_argument("--version", action="version", version=f"hf_osd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("check", help="whether the installed transformers is one that hf_osd can work with")
    grow = commands.add_parser("grow", help="make a draft for a target that has none")
    grow.add_argument("target", help="path or Hub id of a causal LM")
    grow.add_argument("output", help="folder for the draft")
    grow.add_argument(
        "--kind",
        choices=("layers", "feature"),
        default="layers",
        help="layers: a draft made of some of the target's layers; feature: one layer that reads the target's hidden states, as EAGLE-3 does",
    )
    grow.add_argument(
        "--layers",
        help="layers of the target, comma-separated; default 0,1. Of kind feature: after how many layers its hidden states are read, by default three",
    )
    grow.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is in the output folder")
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            return check()
        return grow_to(args.target, args.output, args.layers, args.overwrite, args.kind)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"hf-osd: {error}", file=sys.stderr)
        return 2


def check() -> int:
    """Open the seam, which checks what it relies on."""
    import torch
    import transformers

    from hf_osd.generation import patch as seam

    seam.enable()
    seam.disable()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}: hf_osd can work with these.")
    return 0


def grow_to(target: str, output: str, layers: str | None = None, overwrite: bool = False, kind: str = "layers") -> int:
    """Save a draft of this kind grown from `target`, with its tokenizer, into a folder of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_osd.models.feature_growth import grow_feature_draft
    from hf_osd.saving.drafts import drop_older, files_of_checkpoint, grow_draft
    from hf_osd.system.files import staged
    from hf_osd.system.output_paths import check_apart, check_writable

    try:
        picked = None if layers is None else [int(i) for i in layers.split(",")]
    except ValueError as error:
        raise ValueError(f"`--layers` is {layers!r}; write numbers with commas between, such as 0,1.") from error
    check_apart({"the output": output}, {"the target": target})
    check_writable("The output", output, folder=True)
    if (found := files_of_checkpoint(output)) and not overwrite:
        raise ValueError(
            f"The output {output} has a checkpoint already ({found[0].name}); choose another folder, or pass --overwrite to replace it."
        )
    model = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
    check_apart({"the output": output}, {"the target's base": model.config._name_or_path})  # of an adapter
    draft = grow_feature_draft(model, picked) if kind == "feature" else grow_draft(model, picked or (0, 1))
    tokenizer = AutoTokenizer.from_pretrained(target)
    with staged(output) as staging:
        draft.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        written = {path.name for path in staging.iterdir()}
    drop_older(output, written)
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    print(f"{output}: {draft.num_parameters():,} parameters, {trained:,} of them to train.")
    return 0
