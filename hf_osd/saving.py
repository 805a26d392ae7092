"""`SavableAssistant`: how an assistant's draft and its learner come and go: checkpoints, the Hub, and the state of a restart."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hf_osd.checkpoint import staged
from hf_osd.config import CONFIG_NAME, OnlineConfig
from hf_osd.drafts import load_draft
from hf_osd.model_card import model_card
from hf_osd.trace import read_trace, write_trace

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_osd.assistant import OnlineAssistant

logger = logging.getLogger(__name__)

_STATE, _STATE_VALUES = "learner.safetensors", "learner.json"
_STATE_BUFFER, _STATE_HELD = "buffer.safetensors", "held_back.safetensors"


class SavableAssistant:
    """The part of [`OnlineAssistant`] that touches disk and Hub."""

    def save_pretrained(
        self,
        directory: str | os.PathLike,
        processing_class: PreTrainedTokenizerBase | None = None,
        card: dict | None = None,
    ):
        """Write the serving draft as a plain transformers checkpoint, with `osd_config.json` and a model card beside it.

        Args:
            directory: where to. Files of the same names are replaced, at once and whole; others stay.
            processing_class: the tokenizer, to be saved with it.
            card (`dict`, *optional*): facts for the model card, see [`hf_osd.model_card.model_card`].

        Raises:
            OSError: if it cannot be written; an older checkpoint in `directory` is then unchanged.
            ValueError: if the assistant has no draft.
        """
        self._needs_draft("save")
        with staged(directory) as staging:
            self.serving.active.save_pretrained(staging)
            self.osd_config.save_pretrained(staging)
            (staging / "README.md").write_text(model_card(self.stats, **(card or {})), encoding="utf-8")
            if processing_class is not None:
                processing_class.save_pretrained(staging)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, config: OnlineConfig | None = None, **kwargs
    ) -> OnlineAssistant:
        """An assistant around a saved draft, or any causal LM of the Hub.

        Args:
            name_or_path: a directory or a Hub id.
            config ([`OnlineConfig`], *optional*): replaces the one saved beside the draft, if there is one.
            **kwargs: for `AutoModelForCausalLM.from_pretrained`, such as `dtype`, `device_map`, `revision`, `token`.

        Raises:
            OSError: if there is no such draft, or its weights are damaged.
            ValueError: if it is no causal LM, or its OnlineConfig does not fit.
        """
        from transformers.utils import cached_file

        draft = load_draft(name_or_path, **kwargs)
        if config is None:
            where = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "subfolder") if key in kwargs}
            found = None
            with suppress(OSError):  # a draft that hf_osd did not save
                found = cached_file(name_or_path, CONFIG_NAME, **where)
            config = OnlineConfig.from_json(found) if found is not None else None
        return cls(draft, config)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        token: str | None = None,
        commit_message: str = "Upload an adapted draft",
        processing_class: PreTrainedTokenizerBase | None = None,
        card: dict | None = None,
    ) -> str:
        """Push what `save_pretrained` writes: weights, config and figures, no feedback. Returns the commit's address.

        The repository is private unless you say otherwise: weights that learnt from traffic can have memorised some of it.
        """
        from huggingface_hub import HfApi

        if not private:
            logger.warning(
                "Pushing to a public repository: weights that learnt from traffic can have memorised some of it."
            )
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, processing_class, card)
            return str(api.upload_folder(repo_id=repo_id, folder_path=directory, commit_message=commit_message))

    def save_state(self, directory: str | os.PathLike, with_buffer: bool = False):
        """Write what a restart needs beyond the draft: the learner's float32 weights and optimizer, and counts.

        Args:
            directory: where to.
            with_buffer: also write the feedback, and what is held back from learning: both hold the prompts as token ids, readable by their owner
                alone.

        Raises:
            OSError: if it cannot be written; an older state is then unchanged.
            ValueError: if the assistant does not learn.
        """
        from safetensors.torch import save_file

        if self.learner is None:
            raise ValueError(
                "This assistant does not learn (`learn=False`, or closed), so there is no learner's state to save."
            )
        self.take_in()
        tensors, values = self.learner.state()
        with staged(directory) as staging:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staging / _STATE)
            (staging / _STATE_VALUES).write_text(json.dumps(values), encoding="utf-8")
            if with_buffer:
                self.buffer.save(staging / _STATE_BUFFER)
                held, facts = self.learner.held.state()
                write_trace(staging / _STATE_HELD, held, {"held_back": json.dumps(facts)})
        if not with_buffer:
            # Of an older state: prompts that nobody asks to keep any more, and which do not go with this one.
            for name in (_STATE_BUFFER, _STATE_HELD):
                (Path(directory) / name).unlink(missing_ok=True)

    def load_state(self, directory: str | os.PathLike):
        """Go on from `save_state`: the learner, and with it the serving draft, are as they were.

        Raises:
            OSError: if there is no state in `directory`.
            ValueError: if it is damaged, or that of another draft.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        directory = Path(directory)
        if self.learner is None:
            raise ValueError(
                "This assistant does not learn (`learn=False`, or closed), so it cannot take a learner's state."
            )
        try:
            tensors = load_file(directory / _STATE)
            values = json.loads((directory / _STATE_VALUES).read_text(encoding="utf-8"))
            self.learner.load_state(tensors, values)
            self.learner.refresh()
            if (directory / _STATE_BUFFER).is_file():
                self.buffer.restore(directory / _STATE_BUFFER)
            if (directory / _STATE_HELD).is_file():
                held, facts = read_trace(directory / _STATE_HELD)
                self.learner.held.load_state(held, json.loads(facts["held_back"]))
        except (SafetensorError, json.JSONDecodeError, LookupError, TypeError) as error:
            raise ValueError(
                f"The learner's state in {directory} is damaged, or of another version ({error!r}); delete it to start afresh."
            ) from error
