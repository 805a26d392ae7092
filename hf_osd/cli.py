"""Runs the library's console command, `hf-osd`."""

from __future__ import annotations

import argparse
import sys


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
        default="layers",
        help="of the target's own layers (the default), or one new layer that reads the target's hidden states",
    )
    grow.add_argument(
        "--layers",
        help="layers of the target, comma-separated: those that the draft is made of, default 0,1; with --kind feature those after which it reads the "
        "target's states, default three over the depth",
    )
    grow.add_argument(
        "--layout",
        choices=("osd", "eagle3", "speculators"),
        default="osd",
        help="of --kind feature: as hf_osd has it (the default), or as serving engines read it",
    )
    grow.add_argument("--overwrite", action="store_true", help="replace a checkpoint in the output folder")
    args = parser.parse_args(argv)
    try:
        if args.command == "check":
            return check()
        return grow_to(args.target, args.output, args.layers, args.overwrite, args.kind, args.layout)
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
    kind: str = "layers",
    layout: str = "osd",
) -> int:
    """Grow a draft from `target`, and save it with the target's tokenizer into the folder `output`.

    Raises:
        OSError: if the target cannot be read or the output not be written.
        ValueError: if `layers` are no numbers or none of the target's, the output has a checkpoint already, it would overwrite the target, or the draft cannot be
            saved in the layout.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_osd.models.feature_growth import grow_feature_draft
    from hf_osd.saving.drafts import drop_older, files_of_checkpoint, grow_draft, save_draft
    from hf_osd.system.files import staged
    from hf_osd.system.output_paths import check_apart, check_writable

    grown, layers = (grow_feature_draft, layers) if kind == "feature" else (grow_draft, layers or "0,1")
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
    draft = grown(model, picked)
    tokenizer = AutoTokenizer.from_pretrained(target)
    with staged(output) as staging:
        save_draft(draft, staging, layout=layout, **({"verifier": target} if layout == "speculators" else {}))
        tokenizer.save_pretrained(staging)
        written = {path.name for path in staging.iterdir()}
    drop_older(output, written)
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    print(f"{output}: {draft.num_parameters():,} parameters, {trained:,} of them to train.")
    return 0
