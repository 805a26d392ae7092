"""Makes the models and streams of the encoder-decoder experiment: a small T5 that translates a made-up language into two others, and a draft for it.

    python -m recipes.experiments.paper.translation --output_dir runs/paper/t5

The target has learnt both languages, the draft mostly `north`, so that traffic in `south` is new to it. A translation replaces each word by another, puts adjectives
behind their nouns and verbs at the end of their clauses; in `south` the clauses also come in the reverse order. Nothing is downloaded.
"""

from __future__ import annotations

import json
import logging
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from hf_osd import OnlineConfig
from hf_osd.system.bounds import check_options, number, option, whole
from hf_osd.system.strict_json import write_json
from recipes.common.command import run_command
from recipes.common.models import use_threads
from recipes.common.options import string

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5ForConditionalGeneration

logger = logging.getLogger("hf_osd.recipes.translation")

NORTH, SOUTH = "north", "south"
PAD, END = "<pad>", "</s>"
HEADS = 4
IGNORED = -100  # label of padding, as transformers' losses have it
UNSEEN = 64  # sentences on which a model that was made is judged


@dataclass
class TranslationArguments:
    """What to make. Of `OnlineConfig` only `seed` matters here."""

    output_dir: str = option(
        "runs/paper/t5", string(), "Folder for the folders target and draft, and for the streams."
    )
    nouns: int = option(
        24, whole(2), "Nouns of the source language; it has half as many verbs, and as many adjectives as verbs."
    )
    target_width: int = option(128, whole(8), "Width of the target, a multiple of 4.")
    draft_width: int = option(96, whole(8), "Width of the draft, a multiple of 4.")
    target_layers: int = option(2, whole(1), "Layers of the target's encoder, and of its decoder.")
    draft_layers: int = option(1, whole(1), "Layers of the draft's encoder, and of its decoder.")
    target_steps: int = option(1800, whole(1), "Optimizer steps that the target learns.")
    draft_steps: int = option(900, whole(1), "Optimizer steps that the draft learns.")
    south_of_draft: float = option(0.05, number(0), "Share of sentences in `south` among those that the draft learns.")
    batch: int = option(32, whole(1), "Sentences a step.")
    sentences: int = option(700, whole(1), "Prompts of each stream.")
    threads: int = option(1, whole(1), "CPU threads of torch.")

    def __post_init__(self):
        check_options(self)
        for name in ("target_width", "draft_width"):
            if getattr(self, name) % HEADS:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}; give a multiple of {HEADS}, the number of heads."
                )


class Language:
    """Makes sentences of the source language and translates them.

    Args:
        nouns (`int`): how many nouns there are.
        seed (`int`): of the dictionaries.
    """

    def __init__(self, nouns: int, seed: int):
        verbs = max(nouns // 2, 1)
        self.words = {
            kind: [f"{kind}{i}" for i in range(n)] for kind, n in (("noun", nouns), ("verb", verbs), ("adj", verbs))
        }
        source = [word for words in self.words.values() for word in words]
        self.dictionaries = {}
        for name in (NORTH, SOUTH):
            others = [f"{name}{i}" for i in range(len(source))]
            random.Random(f"{seed}:{name}").shuffle(others)
            self.dictionaries[name] = dict(zip(source, others, strict=True))
        self.vocabulary = [PAD, END, f"<{NORTH}>", f"<{SOUTH}>", *source]
        self.vocabulary += [word for words in self.dictionaries.values() for word in words.values()]

    def sentence(self, draws: random.Random) -> list[list[str]]:
        """Draw a sentence: one or two clauses, each a subject, a verb and an object, either with an adjective or without."""
        return [
            [*self._noun(draws), draws.choice(self.words["verb"]), *self._noun(draws)]
            for _ in range(draws.randint(1, 2))
        ]

    def _noun(self, draws: random.Random) -> list[str]:
        adjective = [draws.choice(self.words["adj"])] if draws.random() < 0.5 else []
        return [*adjective, draws.choice(self.words["noun"])]

    def prompt(self, sentence: list[list[str]], name: str) -> str:
        """Write what the encoder reads: the language to translate into, and the sentence."""
        return " ".join([f"<{name}>", *(word for clause in sentence for word in clause)])

    def translation(self, sentence: list[list[str]], name: str) -> str:
        """Translate a sentence into `north` or `south`."""
        clauses = sentence if name == NORTH else reversed(sentence)
        return " ".join(self.dictionaries[name][word] for clause in clauses for word in _reordered(clause))


def _reordered(clause: list[str]) -> list[str]:
    """Put adjectives behind their nouns, and the verb at the end."""
    words: list[str] = []
    for word in clause:
        at = len(words) - 1 if words and words[-1].startswith("adj") and word.startswith("noun") else len(words)
        words.insert(at, word)
    return sorted(words, key=lambda word: word.startswith("verb"))


def main(argv: list[str] | None = None) -> int:
    """Make the streams and both models; returns the exit status."""
    return run_command(TranslationArguments, make, argv)


def make(args: TranslationArguments, config: OnlineConfig):
    """Write `north.jsonl`, `south.jsonl`, the folders `target` and `draft`, and `facts.json` with what each model has learnt."""
    use_threads(args.threads)
    seed, folder = config.seed or 0, Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    language = Language(args.nouns, seed)
    tokenizer = tokenizer_of(language.vocabulary)
    draws = random.Random(seed + 1)
    for name in (NORTH, SOUTH):
        prompts = [language.prompt(language.sentence(draws), name) for _ in range(args.sentences)]
        rows = [{"id": str(i), "domain": name, "prompt": prompt} for i, prompt in enumerate(prompts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    facts = {"seed": seed}
    settings = {
        "target": (args.target_width, args.target_layers, args.target_steps, 0.5),
        "draft": (args.draft_width, args.draft_layers, args.draft_steps, args.south_of_draft),
    }
    for name, (width, layers, steps, south) in settings.items():
        began = time.perf_counter()
        model = new_model(len(language.vocabulary), width, layers, seed)
        teach(model, language, tokenizer, steps, args.batch, south, seed, name)
        right = {other: share_right(model, language, tokenizer, other, seed) for other in (NORTH, SOUTH)}
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        size = sum(weight.numel() for weight in model.parameters())
        facts[name] = {"parameters": size, "right": right, "seconds": round(time.perf_counter() - began, 1)}
        logger.info("%s: %d parameters; words right in %s", name, size, right)
    write_json(folder / "facts.json", facts)


def tokenizer_of(vocabulary: list[str]) -> PreTrainedTokenizerBase:
    """Make a tokenizer with a token a word, which ends each text with the end token."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=PAD))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, words[END])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD)


def new_model(vocabulary: int, width: int, layers: int, seed: int) -> T5ForConditionalGeneration:
    """Make a T5 that has learnt nothing."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": vocabulary, "d_model": width, "d_kv": width // HEADS, "d_ff": 2 * width, "num_heads": HEADS}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # With a head of its own it learns to align in a third of the steps.
        config = T5Config(**sizes, **tokens, num_layers=layers, dropout_rate=0.0, tie_word_embeddings=False)
        return T5ForConditionalGeneration(config)


def teach(model, language: Language, tokenizer, steps: int, batch: int, south: float, seed: int, name: str):
    """Train a model on translations, of which `south` is the share into that language; each sentence is new."""
    draws = random.Random(f"{seed}:{name}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    model.train()
    for _ in tqdm(range(steps), desc=name, unit="step"):
        languages = [SOUTH if draws.random() < south else NORTH for _ in range(batch)]
        inputs, labels = examples(language, tokenizer, languages, draws)
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def examples(language: Language, tokenizer, languages: list[str], draws: random.Random) -> tuple[dict, Tensor]:
    """Draw a sentence for each language named, and return the encoder's inputs, and the labels int64 `(B, T)`."""
    sentences = [language.sentence(draws) for _ in languages]
    prompts = [language.prompt(one, name) for one, name in zip(sentences, languages, strict=True)]
    answers = [language.translation(one, name) for one, name in zip(sentences, languages, strict=True)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    labels = tokenizer(answers, return_tensors="pt", padding=True)["input_ids"]
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    return inputs, labels.masked_fill(labels == tokenizer.pad_token_id, IGNORED)


@torch.no_grad()
def share_right(model, language: Language, tokenizer, name: str, seed: int) -> float:
    """Count which share of the words of unseen translations into `name` the model predicts, the words before being right."""
    inputs, labels = examples(language, tokenizer, [name] * UNSEEN, random.Random(f"{seed}:unseen"))
    said, known = model(**inputs, labels=labels).logits.argmax(-1), labels != IGNORED
    return round(float((said == labels)[known].float().mean()), 4)


if __name__ == "__main__":
    sys.exit(main())
