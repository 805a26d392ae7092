"""`SavableAssistant` saves and loads an assistant's draft: as a checkpoint, and on the Hub."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

from hf_osd.config import CONFIG_NAME, OnlineConfig
from hf_osd.saving.adapters import describe_adapter
from hf_osd.saving.custom_generate import write_custom_generate
from hf_osd.saving.drafts import CHECKPOINT_FILES, drop_older, load_draft, save_draft
from hf_osd.saving.feature_drafts import layout_of, load_feature_draft
from hf_osd.saving.hub import FROM_WHERE, find_file, from_hub, license_of, open_repository, push_folder, warn_of_push
from hf_osd.saving.model_card import machine_facts, model_card
from hf_osd.saving.state import ResumableAssistant
from hf_osd.system.files import staged

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


class SavableAssistant(ResumableAssistant):
    """Gives [`OnlineAssistant`] its methods for disk and Hub."""

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        processing_class: PreTrainedTokenizerBase | None = None,
        card: dict | None = None,
        custom_generate: bool = False,
        merge: bool | None = None,
        layout: str = "osd",
        **of_layout,
    ):
        """Write the serving draft as a transformers checkpoint, or in an engine's layout, with `osd_config.json` and a model card beside it.

        A draft that came with an adapter (LoRA) is saved as that adapter, with its base beside it, unless the Hub has the same base: then the adapter's config
        names it. A draft that learns in an adapter of hf_osd's own (`adapter="lora"`) is saved as a plain checkpoint, which serving engines read.

        Args:
            directory: the folder to write into. Files of the same names are replaced, whole; files of an older checkpoint that this one lacks are removed;
                others stay.
            processing_class: the tokenizer, saved with the draft.
            card (`dict`, *optional*): facts for the model card, see [`hf_osd.saving.model_card.model_card`].
            custom_generate: also write the generation strategy, see [`hf_osd.saving.custom_generate.write_custom_generate`].
            merge: `True` merges an adapter into the weights; `False` writes it as an adapter, in which `from_pretrained` continues learning. `None` is
                the default described above.
            layout (`str`): for a draft that reads the target's hidden states, `"eagle3"` or `"speculators"` in place of transformers' own form: what vLLM and SGLang
                read, see [`hf_osd.save_feature_draft`].
            **of_layout: `draft_vocab`, `verifier` and `speculative_tokens`, as there.

        Raises:
            OSError: if it cannot be written; an older checkpoint in `directory` is then unchanged.
            ValueError: if the assistant has no draft, several of its adapters are active, or the layout cannot express the draft.
        """
        self._save(directory, processing_class, card, custom_generate, merge=merge, layout=layout, **of_layout)

    def _save(
        self,
        directory: str | os.PathLike,
        processing_class: PreTrainedTokenizerBase | None,
        card: dict | None,
        custom_generate: bool,
        repo_id: str | None = None,
        merge: bool | None = None,
        layout: str = "osd",
        **of_layout,
    ):
        self._needs_draft("save")
        if self.adapter is not None and merge is False:
            draft = self.adapter.with_weights(dict(self.serving.weights()))
        else:
            draft = self.serving.plain()
        with staged(directory) as staging:
            save_draft(draft, staging, repo_id, bool(merge), layout, **of_layout)
            self.osd_config.save_pretrained(staging)
            self._write_card(staging, staging, card, repo_id=repo_id, custom_generate=custom_generate)
            if processing_class is not None:
                processing_class.save_pretrained(staging)
            if custom_generate:
                write_custom_generate(staging)
            written = {path.name for path in staging.iterdir()}
        drop_older(directory, written)

    def write_card(self, directory: str | os.PathLike, card: dict | None = None):
        """Rewrite the model card beside a draft that `save_pretrained` has written, with newer figures.

        Args:
            directory: the folder of the draft.
            card (`dict`, *optional*): facts for the card, see [`hf_osd.saving.model_card.model_card`].

        Raises:
            OSError: if it cannot be written; the older card is then unchanged.
        """
        with staged(directory) as staging:
            self._write_card(staging, Path(directory), card)

    def _write_card(self, into: Path, draft_folder: Path, card: dict | None, **facts):
        """Write the card; if that fails, warn instead of losing the weights."""
        draft = self.serving.active
        try:
            facts |= {
                "lookahead": self.lookahead,
                "config": self.osd_config,
                "adapter": describe_adapter(draft_folder),
                "layout": layout_of(draft_folder),
            }
            facts["machine"] = machine_facts(draft.device, draft.dtype)
            text = model_card(self.stats, **{**facts, **(card or {})})
        except Exception as error:
            logger.warning("The draft is saved without a new model card, which could not be made: %r.", error)
            return
        (into / "README.md").write_text(text, encoding="utf-8", errors="replace")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        config: OnlineConfig | None = None,
        *,
        target: PreTrainedModel | None = None,
        static_draft: PreTrainedModel | None = None,
        **kwargs,
    ) -> Self:
        """Make an assistant with a saved draft, or with any causal LM or encoder-decoder of the Hub.

        Args:
            name_or_path: a directory or a Hub id.
            config ([`OnlineConfig`], *optional*): used in place of the config saved beside the draft.
            target (`PreTrainedModel`, *optional*): the target, whose embeddings a draft that reads its hidden states shares. Such a draft in an engine's layout, an
                EAGLE-3 head, needs it. Others do without.
            static_draft (`PreTrainedModel`, *optional*): as for [`OnlineAssistant`]; none is saved.
            **kwargs: passed to transformers' `from_pretrained`, such as `dtype`, `device_map`, `revision`, `token`.

        Raises:
            OSError: if there is no such draft, its weights are damaged, or the Hub refuses or cannot be reached; the message names the remedy.
            ValueError: if it is neither a causal LM nor an encoder-decoder, its saved OnlineConfig is not valid, or it needs a `target`, or another one.
        """
        where = {key: kwargs[key] for key in (*FROM_WHERE, "subfolder") if key in kwargs}

        def load():
            if target is not None and layout_of(name_or_path, **where) is not None:
                draft = load_feature_draft(name_or_path, target, **where)
            else:
                draft = load_draft(name_or_path, **kwargs)
            if config is not None:
                return draft, config
            found = find_file(name_or_path, CONFIG_NAME, **where)  # `None` for a draft that hf_osd did not save
            return draft, OnlineConfig.from_json(found) if found is not None else None

        return cls(*from_hub(name_or_path, load), static_draft=static_draft)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        token: str | None = None,
        commit_message: str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        card: dict | None = None,
        custom_generate: bool = False,
        merge: bool | None = None,
        layout: str = "osd",
        **of_layout,
    ) -> str:
        """Push what `save_pretrained` writes, in one commit: weights, config and figures, no feedback. Returns the commit's address, whose last part is
        a `revision` for `from_pretrained`.

        The repository is private by default: weights that learnt from traffic can have memorised some of it. Temporary failures of the Hub are retried, and
        repeating a push uploads no weights a second time.

        Args:
            repo_id: the repository; made if it does not exist.
            private: make the repository private, and refuse one that is public.
            token: a token of the Hub; `None` uses the one you are logged in with.
            commit_message: `None` writes one with the number of updates and requests.
            processing_class, card, custom_generate, merge, layout, **of_layout: as in `save_pretrained`. The licence, if `card` has none, is read from its `target` on the Hub.

        Raises:
            OSError: if the Hub refuses or cannot be reached: huggingface_hub's `HfHubHTTPError`, or a `ConnectionError`; the message names the remedy.
            ValueError: if the repository exists, is public, and `private` is set; or as in `save_pretrained`. Nothing is pushed then.
        """
        from huggingface_hub import HfApi

        self._needs_draft("push")
        warn_of_push(logger, "the draft", repo_id, private)
        api, card, stats = HfApi(token=token), dict(card or {}), self.stats
        repo_id = open_repository(api, repo_id, private)
        if card.get("license") is None and card.get("target"):
            card |= license_of(api, card["target"])
        message = commit_message or f"Draft after {stats.updates} updates on {stats.total.requests} requests"
        with tempfile.TemporaryDirectory() as directory:
            self._save(directory, processing_class, card, custom_generate, repo_id, merge, layout, **of_layout)
            return push_folder(api, repo_id, Path(directory), message, CHECKPOINT_FILES)
