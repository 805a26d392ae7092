"""What the recipes' flags name: targets, drafts, threads, prompts."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd.saving import drafts
from hf_osd.saving.hub import find_file
from hf_osd.system.bounds import check_options, choice, option, whole
from recipes.common.options import optional_string, string

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("hf_osd.recipes.models")

DTYPES = ("auto", "float32", "bfloat16", "float16")
EMBEDDED = "embedded"
EMBEDDED_FACTS = {
    "target": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
}  # for the card of its drafts
# Whichever of these is there, transformers makes a tokenizer of; of none of them, for some kinds of model, an empty one without a word.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
TOKENIZER_FILES += ("vocab.txt", "tekken.json")
# What a generation config may ask for and recipes do not do, with the values that ask for nothing: they decode one answer a prompt, token by token, up to a
# number of tokens, with a cache that can be cropped.
SET_ASIDE = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "use_mtp": (False,),
    "use_cache": (True,),
    "cache_implementation": ("dynamic", "dynamic_full"),
    "guidance_scale": (1, 1.0),
    "stop_strings": (),
    "token_healing": (False,),
    "return_dict_in_generate": (False,),
}
# Of no use without some of them, and refused by transformers where the draft is saved: set aside without a word.
WITH_THEM = (
    "early_stopping",
    "length_penalty",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)
_PRINTED = 64  # values of each weight


@dataclass
class TargetArguments:
    """What every recipe is told of its target."""

    target: str = option("embedded", string(), "Path or Hub id of the target, or 'embedded'.")
    dtype: str = option("auto", choice(*DTYPES), "'auto' (the checkpoint's), 'float32', 'bfloat16' or 'float16'.")
    threads: int | None = option(None, whole(1).or_none(), "CPU threads of torch; all cores if left out.")
    device: str | None = option(
        None, optional_string(), "Where models run; this machine's accelerator, if it has one, when left out."
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class ModelArguments(TargetArguments):
    """And of its draft."""

    draft: str = option("grow:0,1", string(), "Path or Hub id of the draft, or 'grow:' and layers.")


def use_threads(threads: int | None, processes: int = 1):
    """Give torch `threads` CPU threads, or all cores that this process may use, shared with the other `processes` of its kind on the machine:
    `accelerate launch` leaves it one, without a word."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(cores // processes, 1))


def load_target(
    name: str, dtype: str, device: torch.device | str | None = None, encoders: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The target and its tokenizer, frozen and in eval mode.

    Args:
        name: a path, a Hub id, or `"embedded"` for the model that needs no hub.
        dtype: `"auto"` (the checkpoint's), or a torch dtype's name.
        device: where to; the accelerator, if there is one, when left out.
        encoders: whether it may be an encoder-decoder.

    Raises:
        ValueError: if it is one and may not.
        OSError: if there is no such target.
    """
    from transformers import AutoTokenizer

    from recipes.common.embedded import embedded_target

    where = embedded_target() if name == EMBEDDED else name
    target = drafts.load_model(where, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    if target.config.is_encoder_decoder and not encoders:
        raise ValueError(
            f"The target {name} is an encoder-decoder ({type(target).__name__}), which recipes/distill.py serves alone of the recipes; choose a decoder."
        )
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    target.to(device).eval().requires_grad_(False)
    decode_alone(target, f"The target {name}")
    return target, AutoTokenizer.from_pretrained(where)


def decode_alone(model: PreTrainedModel, what: str):
    """Set aside what the model's generation config asks for beyond one answer, token by token; a warning says what that was."""
    config, aside = model.generation_config, []
    for name, nothing in SET_ASIDE.items():
        value = getattr(config, name, None)
        if value is not None and value not in nothing:
            aside.append(f"{name}={value!r}")
            setattr(config, name, True if name == "use_cache" else None)
    for name in WITH_THEM:
        setattr(config, name, None)
    if aside:
        logger.warning(
            "%s has a generation config that asks for %s: set aside, for recipes decode one answer a prompt, token by token, as speculative decoding does.",
            what,
            ", ".join(aside),
        )


def print_of(model: PreTrainedModel) -> str:
    """What tells a model from another of its kind: a digest of some values of each of its weights."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        digest.update(flat[:: max(len(flat) // _PRINTED, 1)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_draft(name: str, target: PreTrainedModel, any_vocabulary: bool = False) -> PreTrainedModel:
    """A draft for `target`: a path, a Hub id, or `"grow:0,1"` for one made of these layers of the target.

    Args:
        name, target: the draft, and what it is to draft for, whose dtype and device it gets.
        any_vocabulary: whether its tokens may be others than the target's; see `draft_tokenizers`.

    Raises:
        ValueError: if the name cannot be read, or the vocabularies differ and may not.
        OSError: if there is no such draft.
    """
    if name.startswith("grow:"):
        try:
            layers = [int(i) for i in name.removeprefix("grow:").split(",")]
        except ValueError as error:
            raise ValueError(f"`draft` is {name!r}; write 'grow:' and layer numbers, such as grow:0,1.") from error
        return drafts.grow_draft(target, layers)
    draft = drafts.load_draft(name, dtype=target.dtype).to(target.device)
    decode_alone(draft, f"The draft {name}")
    kinds = [one.config.is_encoder_decoder for one in (target, draft)]
    if kinds[0] != kinds[1]:
        words = [
            f"an encoder-decoder ({type(one).__name__})" if kind else f"a decoder ({type(one).__name__})"
            for one, kind in zip((target, draft), kinds, strict=True)
        ]
        raise ValueError(
            f"The target is {words[0]} and the draft {name} {words[1]}; choose a draft of the target's kind."
        )
    tokens = [model.config.get_text_config().vocab_size for model in (target, draft)]
    if tokens[0] != tokens[1] and not any_vocabulary:
        raise ValueError(
            f"The target has {tokens[0]} tokens and the draft {name} {tokens[1]}; choose a draft of the target's family "
            f"and padding (draft.resize_token_embeddings({tokens[0]}) where only the padding differs), or --draft grow:0,1. "
            "distill.py, lossless.py, benchmark.py --what methods and, on traces of record.py --draft, replay.py take such drafts."
        )
    return draft


def draft_tokenizers(
    name: str, draft: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, PreTrainedTokenizerBase]:
    """What `generate` has to be given beside a draft of another vocabulary: `tokenizer`, the target's, and `assistant_tokenizer`, which is loaded from where
    the draft is. Nothing, if both have the same tokens.

    Raises:
        ValueError: if there is no tokenizer and one is needed, or the two differ and `generate` could not tell, for it goes by sizes.
    """
    if name.startswith("grow:"):
        return {}
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
    own = None
    try:
        own = _tokenizer_of(name, draft)
    except OSError:  # a Hub that does not answer, say: by the sizes none is needed
        if sizes[0] != sizes[1]:
            raise
    if sizes[0] != sizes[1]:
        if own is None:
            raise ValueError(
                f"The target has {sizes[0]} tokens and the draft {name} {sizes[1]}, and there is no tokenizer with the draft. Save the one that it was "
                "trained with beside it, by AutoTokenizer.from_pretrained(...).save_pretrained(folder): the target's, if only the padding differs."
            )
        return {"tokenizer": tokenizer, "assistant_tokenizer": own}
    if own is not None and not _mostly_the_same(tokenizer.get_vocab(), own.get_vocab()):
        raise ValueError(
            f"The target and the draft {name} have {sizes[0]} tokens each, of other tokenizers, which transformers takes for one. Give the draft a head of "
            f"another size, by draft.resize_token_embeddings({sizes[1] + 1}), and save it with its own tokenizer; or choose --draft grow:0,1."
        )
    return {}


def _tokenizer_of(name: str, draft: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Where the draft is; where its base is, for an adapter that has none with it."""
    from transformers import AutoTokenizer

    for where in dict.fromkeys((name, getattr(draft.config, "_name_or_path", "") or name)):
        if any(find_file(where, file) is not None for file in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(where)
    return None


def _mostly_the_same(ours: dict[str, int], theirs: dict[str, int]) -> bool:
    """Whether most tokens have the same id: those of one family may name some special ones differently."""
    same = sum(theirs.get(token) == i for token, i in ours.items())
    return 2 * same > min(len(ours), len(theirs))


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


def _encode_row(tokenizer: PreTrainedTokenizerBase, name: str, row: dict, chat_template: bool) -> Tensor:
    """`encode`, with an error that says which row it was and does not tell its prompt."""
    try:
        ids = encode(tokenizer, row["prompt"], chat_template)
    except Exception as error:  # a chat template raises whatever it likes
        mend = ", or try --no_chat_template" if chat_template and tokenizer.chat_template is not None else ""
        raise ValueError(
            f"{name}: the target's tokenizer refuses the prompt with the id {row.get('id')} ({type(error).__name__}); leave it out{mend}."
        ) from error
    if not len(ids):
        raise ValueError(
            f"{name}: the prompt with the id {row.get('id')} has no tokens for the target's tokenizer; leave it out."
        )
    return ids


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
    after = 0 if target.config.is_encoder_decoder else max_new_tokens  # an encoder reads the prompt alone
    encoded = [{**row, "ids": _encode_row(tokenizer, name, row, chat_template)} for row in rows]
    fitting = [row for row in encoded if window is None or len(row["ids"]) + after <= window]
    if skipped := len(encoded) - len(fitting):
        logger.warning("%s: skipped %d prompts longer than the window of %d tokens.", name, skipped, window)
    return fitting, skipped


def shuffled(rows: list, seed: int) -> list:
    """`rows` in random order, the same for the same seed. Files come by module or by database, which would be a drift in every figure."""
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]


def answer(target: PreTrainedModel, prompt: Tensor, max_new_tokens: int, **kwargs) -> Tensor:
    """Prompt and greedy answer, `(L,)` on the CPU, or of an encoder-decoder what its decoder has read and said; `kwargs` are for `generate`."""
    input_ids = prompt[None].to(target.device)
    output = target.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **kwargs,
    )
    return output[0].cpu()  # waits for the device
