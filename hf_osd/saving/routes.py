"""`SavableRoutes` saves and loads the drafts of a [`RoutedAssistant`]: the draft as it came once, and for each route what it has learnt."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from hf_osd.config import CONFIG_NAME, OnlineConfig
from hf_osd.models.copies import fingerprint
from hf_osd.models.pool import DEFAULT, file_name, write_weights
from hf_osd.saving.drafts import load_draft, save_draft
from hf_osd.saving.hub import FROM_WHERE, find_file, from_hub, open_repository, push_folder, warn_of_push
from hf_osd.system.files import staged
from hf_osd.system.strict_json import dumps, loads

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

POOL_NAME, _ROUTER_NAME = "pool.json", "router.safetensors"
_VERSION = 1


class SavableRoutes:
    """Gives [`RoutedAssistant`] its methods for disk and Hub."""

    def save_pretrained(self, directory: str | os.PathLike, processing_class: PreTrainedTokenizerBase | None = None):
        """Write the draft as it came as a transformers checkpoint, a file of learnt weights for each route in memory, the router's topics, and `pool.json`.

        The router's topics are means over prompts, and no prompts. Files of other routes that lie there stay.

        Raises:
            OSError: if it cannot be written; what was there is then unchanged.
        """
        from safetensors.torch import save_file

        self.collect()
        with self._lock, staged(directory) as staging:
            save_draft(self._shared.draft, staging)
            self.osd_config.save_pretrained(staging)
            if processing_class is not None:
                processing_class.save_pretrained(staging)
            routes, base = {}, fingerprint(self._shared.draft.parameters())
            for name, assistant in self._assistants():
                if name == DEFAULT and not assistant.serving.version:
                    continue
                write_weights(assistant, staging / file_name(name), base)
                routes[name] = {"file": file_name(name), "requests": assistant.stats.total.requests}
            facts = {
                "version": _VERSION,
                "routes": routes,
                "adapter": None if self._default.adapter is None else self._default.adapter.rank,
                "base": base,
                "settings": {"routes": "named" if self.router is None else "topics", "max_routes": self.max_routes}
                | {"topic_requests": self.topic_requests, "tenants_are_routes": self.tenants_are_routes},
            }
            if self.router is not None:
                tensors: dict[str, Tensor] = {}
                facts["router"] = _without_tensors(self.router.state(), tensors)
                save_file(tensors, staging / _ROUTER_NAME)
            (staging / POOL_NAME).write_text(dumps(facts, exact=True), encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        config: OnlineConfig | None = None,
        *,
        draft: PreTrainedModel | None = None,
        static_draft: PreTrainedModel | None = None,
        **kwargs,
    ) -> Self:
        """Make a routed assistant with all saved routes, from a folder or the Hub.

        Args:
            name_or_path: what `save_pretrained` or `push_to_hub` has written.
            config ([`OnlineConfig`], *optional*): used in place of the saved one.
            draft (`PreTrainedModel`, *optional*): the draft as it came, if it is not to be loaded from there.
            static_draft (`PreTrainedModel`, *optional*): as for [`RoutedAssistant`]; none is saved.
            **kwargs: `max_routes`, `topic_requests`, `pool_bytes`, `pool_folder`, `routes`, `tenants_are_routes`, as for [`RoutedAssistant`]; all others are passed to transformers' `from_pretrained`.

        Raises:
            OSError: if there is no pool, or it cannot be read.
            ValueError: if it was saved by another version, or its routes have learnt over another draft or in another adapter.
        """
        from safetensors.torch import load_file

        own = ("max_routes", "topic_requests", "pool_bytes", "pool_folder", "routes", "tenants_are_routes")
        settings = {key: kwargs.pop(key) for key in own if key in kwargs}
        where = {key: kwargs[key] for key in (*FROM_WHERE, "subfolder") if key in kwargs}

        def load():
            path = find_file(name_or_path, POOL_NAME, **where)
            if path is None:
                raise FileNotFoundError(
                    f"{name_or_path} has no {POOL_NAME}: it is no pool of drafts. One draft loads with OnlineAssistant.from_pretrained."
                )
            facts = loads(Path(path).read_text(encoding="utf-8"))
            if facts.get("version") != _VERSION:
                raise ValueError(
                    f"{POOL_NAME} in {name_or_path} has version {facts.get('version')!r}, and this hf_osd reads {_VERSION}; load it with the hf_osd that saved it."
                )
            base = draft if draft is not None else load_draft(name_or_path, **kwargs)
            found = config
            if found is None:
                saved = find_file(name_or_path, CONFIG_NAME, **where)
                found = OnlineConfig.from_json(saved) if saved is not None else None
            files = {name: find_file(name_or_path, facts["routes"][name]["file"], **where) for name in facts["routes"]}
            if lacking := [name for name, file in files.items() if file is None]:
                raise FileNotFoundError(
                    f"The weights of route {lacking[0]!r} are missing in {name_or_path}; save or push the pool again."
                )
            return base, found, facts, files, find_file(name_or_path, _ROUTER_NAME, **where)

        base, found, facts, files, router = from_hub(name_or_path, load)
        assistant = cls(base, found, static_draft=static_draft, **{**facts["settings"], **settings})
        own_rank = None if assistant._default.adapter is None else assistant._default.adapter.rank
        if facts["base"] != fingerprint(assistant._shared.draft.parameters()):
            raise ValueError(
                f"The routes in {name_or_path} have learnt over another draft than the {type(base).__name__} given; load them over the one that they were saved with."
            )
        if facts["adapter"] != own_rank:
            kinds = [
                f"a LoRA adapter of rank {rank}" if rank else "all weights" for rank in (facts["adapter"], own_rank)
            ]
            raise ValueError(
                f"The routes in {name_or_path} have learnt in {kinds[0]}, and here they would in {kinds[1]}. Load them with the saved config, or one with the same adapter and lora."
            )
        for name, file in files.items():
            weights = load_file(file)
            if name == DEFAULT:
                assistant._default.take_weights(weights)
            else:
                assistant.pool.add(name, weights)
        if assistant.router is not None and "router" in facts and router is not None:
            assistant.router.load_state(_with_tensors(facts["router"], load_file(router)))
            assistant.keep_routes(files.keys())
        return assistant

    def save_route(self, name: str, directory: str | os.PathLike, merge: bool | None = True, **how):
        """Write one route's draft by itself, as [`OnlineAssistant.save_pretrained`] does: a plain checkpoint, with an adapter merged into it, which engines read.

        Raises:
            ValueError: if there is no such route in memory.
        """
        with self._lock:
            assistant = self._named(name)
        assistant.save_pretrained(directory, merge=merge, **how)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        token: str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
    ) -> str:
        """Push what `save_pretrained` writes, in one commit; returns its address. Private by default: weights that learnt from traffic can have memorised some of it.

        Raises:
            OSError: if the Hub refuses or cannot be reached.
            ValueError: if the repository exists, is public, and `private` is set.
        """
        from huggingface_hub import HfApi

        warn_of_push(logger, f"the drafts of {len(self.pool)} routes", repo_id, private)
        api = HfApi(token=token)
        repo_id = open_repository(api, repo_id, private)
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory, processing_class)
            message = f"Drafts of {len(self.pool)} routes after {self.stats.total.requests} requests"
            return push_folder(api, repo_id, Path(directory), message, ("*.safetensors", POOL_NAME))

    def _named(self, name: str):
        found = dict(self._assistants())
        if name not in found:
            raise ValueError(f"There is no route {name!r} in memory; there are {', '.join(map(repr, found))}.")
        return found[name]


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Replace the tensors in nested dicts and lists by names, under which they go into `tensors`."""
    if isinstance(value, torch.Tensor):
        name = f"t{len(tensors)}"
        tensors[name] = value.contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {key: _without_tensors(one, tensors) for key, one in value.items()}
    return [_without_tensors(one, tensors) for one in value] if isinstance(value, (list, tuple)) else value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _with_tensors(one, tensors) for key, one in value.items()}
    return [_with_tensors(one, tensors) for one in value] if isinstance(value, list) else value
