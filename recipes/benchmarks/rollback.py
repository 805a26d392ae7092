"""What it costs a target with recurrent states to take a block back, beside a target of the same size with attention alone: random models, scripted blocks.

python -m recipes.benchmarks.rollback --dtype bfloat16 --threads 1
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from hf_osd import OnlineConfig, enable
from hf_osd.generation.running import running_calls
from hf_osd.models.hot_swap import NullDraft
from hf_osd.system.bounds import check_options, choice, option, whole
from recipes.common.command import run_command
from recipes.common.models import use_threads
from recipes.common.options import optional_string

MOST_CARRIED = 16
# Drafted tokens that are right, and wrong ones after them.
BLOCKS = {"plain": (0, 0), "accepted whole": (4, 0), "accepted in part": (2, 2)}


@dataclass
class RollbackArguments:
    """The models, which have Qwen 3.5's shape. No setting of `OnlineConfig` counts but the seed."""

    hidden: int = option(1024, whole(64), "Hidden size.")
    layers: int = option(24, whole(4), "Layers, of which every fourth has attention.")
    prompt: int = option(64, whole(1), "Tokens of the prompt.")
    rounds: int = option(24, whole(4), "Rounds that are timed, of each kind.")
    grow: int = option(
        0, whole(0), "Also hold the copies of states against their size after an answer of so many tokens."
    )
    dtype: str = option("bfloat16", choice("float32", "bfloat16", "float16"), "Dtype of the models.")
    threads: int = option(1, whole(1), "CPU threads.")
    device: str | None = option(None, optional_string(), "Device; the CPU if left out.")
    json: str | None = option(None, optional_string(), "Write the figures to this file.")

    def __post_init__(self):
        check_options(self)


class Forced(LogitsProcessor):
    """Makes the target answer with a given text: at a near-tie of coarse arithmetic it would part from it, and all later blocks would be rejected."""

    def __init__(self, text: Tensor):
        self._text = text

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self._text[0, input_ids.shape[1]]] = 0.0
        return scores


class Scripted(NullDraft):
    """Acts as an assistant that drafts the same kind of block in each round: some right tokens and some wrong ones."""

    requires_model_outputs = False

    def __init__(self, text: Tensor, right: int, wrong: int):
        super().__init__()
        self._text, self._right, self._wrong = text, right, wrong
        self.seconds: list[float] = []
        self.copied = self._first = self._carried = self._right_now = 0

    def open_call(self, request) -> Scripted:
        self._began, self._first = time.perf_counter(), True
        return self

    def get_candidates(self, input_ids: Tensor) -> tuple[Tensor, None]:
        plain = self._first or self._carried >= MOST_CARRIED  # as the policy has it, for both targets
        room = self._text.shape[1] - input_ids.shape[1] - 1
        at, self._right_now = input_ids.shape[1], 0 if plain else min(self._right, room)
        wrong = 0 if plain else min(self._wrong, room - self._right_now)
        self._carried = self._carried + self._right_now + 1 if wrong else 0
        drafts = self._text[:, at : at + self._right_now]
        after = self._text[:, at + self._right_now : at + self._right_now + wrong]
        return torch.cat([input_ids, drafts, (after + 1) % 1000], dim=-1), None

    def update_candidate_strategy(self, input_ids: Tensor, scores: Tensor, num_matches: int):
        now = time.perf_counter()
        if int(num_matches) != self._right_now:
            raise RuntimeError(f"A round accepted {num_matches} tokens that was to accept {self._right_now}.")
        rollback = running_calls()[-1].rollback
        if not self._first:
            self.seconds.append(now - self._began)
        self._first = False
        if rollback is not None:
            self.copied = max(self.copied, rollback.nbytes)
        self._began = time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    """Time each kind of round with both models in turn and print a table; returns the exit status."""
    return run_command(RollbackArguments, measure, argv)


def model_of(args: RollbackArguments, kinds: list[str]) -> torch.nn.Module:
    """Make a random model with these layers."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    heads = args.hidden // 128
    config = Qwen3_5TextConfig(
        hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=max(heads // 4, 1),
        head_dim=128, linear_key_head_dim=128, linear_value_head_dim=128, linear_num_key_heads=heads, linear_num_value_heads=heads, vocab_size=32000,
        layer_types=kinds, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3_5ForCausalLM(config).to(args.device or "cpu", getattr(torch, args.dtype)).eval()


def measure(args: RollbackArguments, config: OnlineConfig):
    """Time rounds of both models."""
    use_threads(args.threads)
    enable()
    mixed = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(args.layers)]
    models = {"recurrent": model_of(args, mixed), "attention": model_of(args, ["full_attention"] * args.layers)}
    figures, length = {}, args.prompt + 5 * args.rounds
    text = torch.randint(
        2,
        1000,
        (1, max(length, args.prompt + args.grow) + 1),
        generator=torch.Generator().manual_seed(config.seed or 0),
    )
    text = text.to(args.device or "cpu")
    forced, prompt = LogitsProcessorList([Forced(text)]), text[:, : args.prompt]
    for name, model in models.items():
        figures[name] = {"parameters": model.num_parameters(), "copied": 0}

        def serve(right: int, wrong: int, most: int, model=model) -> Scripted:
            scripted = Scripted(text[:, :most], right, wrong)
            model.generate(prompt, assistant_model=scripted, max_length=most, do_sample=False, logits_processor=forced)
            return scripted

        for kind, (right, wrong) in BLOCKS.items():
            serve(right, wrong, args.prompt + 3 * (right + 1))  # to warm up
            scripted = serve(right, wrong, args.prompt + args.rounds * (right + 1))
            figures[name][kind] = statistics.mean(scripted.seconds)
            figures[name]["copied"] = max(figures[name]["copied"], scripted.copied)
        if args.grow and name == "recurrent":
            figures[name]["copied after a long answer"] = serve(2, 2, args.prompt + args.grow).copied
    print("Means of rounds; those accepted in part with the plain ones between, which absorb what is carried.")
    print("| target | parameters | plain round | accepted whole | in part | in part over whole | copy of states |")
    print("|---|---|---|---|---|---|---|")
    for name, found in figures.items():
        times = [f"{1e3 * found[kind]:.1f} ms" for kind in BLOCKS]
        ratio = found["accepted in part"] / found["accepted whole"]
        print(
            f"| {name} | {found['parameters']:,} | {' | '.join(times)} | {ratio:.2f} | {found['copied'] / 2**20:.1f} MiB |"
        )
    if "copied after a long answer" in figures["recurrent"]:
        print(
            f"After {args.grow} tokens the copy takes {figures['recurrent']['copied after a long answer'] / 2**20:.1f} MiB."
        )
    beside = figures["recurrent"]["accepted in part"] / figures["attention"]["accepted in part"]
    print(f"A round accepted in part, recurrent over attention: {beside:.2f}.")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    sys.exit(main())
