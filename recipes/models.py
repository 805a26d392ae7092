"""What the recipes' flags name: targets, drafts, threads, prompts."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd import drafts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("hf_osd.recipes.models")

DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED = "embedded"
EMBEDDED_FACTS = {
    "target": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
}  # for the card of its drafts


@dataclass
class TargetArguments:
    """What every recipe is told of its target."""

    target: str = field(default="embedded", metadata={"help": "Path or Hub id of the target, or 'embedded'."})
    dtype: str = field(
        default="auto", metadata={"help": "'auto' (the checkpoint's), 'float32', 'bfloat16' or 'float16'."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads of torch; all cores if left out."})
    device: str | None = field(default=None, metadata={"help": "Where models run; this machine's accelerator, if it has one, when left out."})

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` is {self.dtype!r}; choose one of {', '.join(map(repr, DTYPES))}.")


@dataclass
class ModelArguments(TargetArguments):
    """And of its draft."""

    draft: str = field(default="grow:0,1", metadata={"help": "Path or Hub id of the draft, or 'grow:' and layers."})


def use_threads(threads: int | None, processes: int = 1):
    """Give torch `threads` CPU threads, or all cores that this process may use, shared with the other `processes` of its kind on the machine:
    `accelerate launch` leaves it one, without a word."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(cores // processes, 1))


def load_target(
    name: str, dtype: str, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target and its tokenizer, frozen and in eval mode.

    Args:
        name: a path, a Hub id, or `"embedded"` for the model that needs no hub.
        dtype: `"auto"` (the checkpoint's), or a torch dtype's name.
        device: where to; the accelerator, if there is one, when left out.
    """
    from embedded import embedded_target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = embedded_target() if name == EMBEDDED else name
    target = AutoModelForCausalLM.from_pretrained(where, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    target.to(device).eval().requires_grad_(False)
    return target, AutoTokenizer.from_pretrained(where)


def load_draft(name: str, target: PreTrainedModel) -> PreTrainedModel:
    """A draft for `target`: a path, a Hub id, or `"grow:0,1"` for one made of these layers of the target.

    Raises:
        ValueError: if the name cannot be read, or the vocabularies differ.
        OSError: if there is no such draft.
    """
    if name.startswith("grow:"):
        try:
            layers = [int(i) for i in name.removeprefix("grow:").split(",")]
        except ValueError as error:
            raise ValueError(f"`draft` is {name!r}; write 'grow:' and layer numbers, such as grow:0,1.") from error
        return drafts.grow_draft(target, layers)
    draft = drafts.load_draft(name, dtype=target.dtype).to(target.device)
    tokens = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"The target has {tokens[0]} tokens and the draft {name} {tokens[1]}; choose a draft of the target's family, or "
            "--draft grow:0,1."
        )
    return draft


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat_template: bool = True) -> Tensor:
    """A prompt's token ids, int64 `(L,)`, through the chat template where there is one."""
    if chat_template and tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return encoded["input_ids"][0]


def encode_rows(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    rows: list[dict],
    max_new_tokens: int,
    chat_template: bool = True,
) -> tuple[list[dict], int]:
    """A stream's rows with their token ids as `ids`, without those that leave the window no room for an answer, and how many these are."""
    window = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    encoded = [{**row, "ids": encode(tokenizer, row["prompt"], chat_template)} for row in rows]
    fitting = [row for row in encoded if window is None or len(row["ids"]) + max_new_tokens <= window]
    if skipped := len(encoded) - len(fitting):
        logger.warning("%s: skipped %d prompts longer than the window of %d tokens.", name, skipped, window)
    return fitting, skipped


def shuffled(rows: list, seed: int) -> list:
    """`rows` in random order, the same for the same seed. Files come by module or by database, which would be a drift in every figure."""
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]


def answer(target: PreTrainedModel, prompt: Tensor, max_new_tokens: int, **kwargs) -> Tensor:
    """Prompt and greedy answer, `(L,)` on the CPU; `kwargs` are for `generate`."""
    input_ids = prompt[None].to(target.device)
    output = target.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **kwargs,
    )
    return output[0].cpu()  # waits for the device
