"""What the recipes' flags name: targets, drafts, threads, prompts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd import drafts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
EMBEDDED_FACTS = {
    "target": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
}  # for the card of its drafts


def use_threads(threads: int | None):
    """Give torch `threads` CPU threads, or all cores this process may use: `accelerate launch` leaves it one, without a word."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or cores)


def load_target(
    name: str, dtype: str, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target and its tokenizer, frozen and in eval mode.

    Args:
        name: a path, a Hub id, or `"embedded"` for the model that needs no hub.
        dtype: `"auto"` (the checkpoint's), or a torch dtype's name.
    """
    from embedded import embedded_target
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = embedded_target() if name == EMBEDDED else name
    target = AutoModelForCausalLM.from_pretrained(where, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    target.to(device).eval().requires_grad_(False)
    return target, AutoTokenizer.from_pretrained(where)


def load_draft(name: str, target: PreTrainedModel) -> PreTrainedModel:
    """A draft for `target`: a path, a Hub id, or `"grow:0,-1"` for one made of these layers of the target.

    Raises:
        ValueError: if the name cannot be read, or the vocabularies differ.
        OSError: if there is no such draft.
    """
    if name.startswith("grow:"):
        try:
            layers = [int(i) for i in name.removeprefix("grow:").split(",")]
        except ValueError as error:
            raise ValueError(f"`draft` is {name!r}; write 'grow:' and layer numbers, such as grow:0,-1.") from error
        return drafts.grow_draft(target, layers)
    draft = drafts.load_draft(name, dtype=target.dtype).to(target.device)
    tokens = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if tokens[0] != tokens[1]:
        raise ValueError(
            f"The target has {tokens[0]} tokens and the draft {name} {tokens[1]}; choose a draft of the target's family, or "
            "--draft grow:0,-1."
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
