"""`DraftRefresh` replaces the draft of a running vLLM engine by newer weights. docs/engines.md has the commands."""

from __future__ import annotations

import json
from pathlib import Path

# Of a config, what gives a draft its sizes.
_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "draft_vocab_size"),
)
# Differences to name.
_NAMED = 5


class DraftRefresh:
    """Replaces the weights of the speculative draft in place.

    vLLM (0.32) mixes this class into its workers with `--worker-extension-cls hf_osd.engines.vllm.DraftRefresh`.
    """

    def check_draft(self, folder: str) -> list[str]:
        """Tell what keeps the draft of `folder` from taking the place of the engine's; nothing if it may. It reads no weights, and may be called while requests run.

        Sizes are compared with the config of the engine's draft; names and shapes of tensors with the files that it was loaded from, where these are still there.

        Args:
            folder (`str`): a folder that `save_pretrained` wrote, on the worker's machine.

        Raises:
            RuntimeError: if the engine has no draft of its own.
            OSError: if `folder` has no safetensors.
        """
        if self.get_draft_model() is None:
            raise RuntimeError(
                "The engine has no draft: start it with a `speculative_config` of method draft_model or eagle3."
            )
        shapes = tensor_shapes(Path(folder))
        if not shapes:
            raise FileNotFoundError(f"No *.safetensors in {folder}: give the folder that save_pretrained wrote.")
        serves = self.vllm_config.speculative_config.draft_model_config
        wrong = _other_sizes(serves.hf_config, Path(folder) / "config.json")
        # Read once: what the engine was started with may be removed while it runs.
        known = self.__dict__.setdefault("_draft_shapes", tensor_shapes(Path(serves.model)))
        if not wrong and known:
            # Some files have what is computed, or the embeddings once more as the head.
            idle = {"lm_head.weight"} if getattr(serves.hf_config, "tie_word_embeddings", False) else set()
            wrong = [
                f"The tensor {name} is {_shape(shapes.get(name))} in the folder and {_shape(known.get(name))} in the engine."
                for name in sorted(known.keys() | shapes.keys())
                if known.get(name) != shapes.get(name) and name not in idle and not name.endswith("inv_freq")
            ]
        more = [f"And {len(wrong) - _NAMED} others."] if len(wrong) > _NAMED else []
        return wrong[:_NAMED] + more

    def refresh_draft(self, folder: str) -> str:
        """Load the safetensors of `folder` into the draft, in place; return the class name of the draft's module.

        The draft must have the architecture, sizes and dtype of the one that the engine was started with. Call it while no request
        runs, and reset the prefix cache afterwards: the old weights computed what it holds, which costs acceptance and never changes the output.
        What cannot be read, or is another draft, is refused before the first weight is replaced.

        Args:
            folder (`str`): a folder that `save_pretrained` wrote, on the worker's machine.

        Raises:
            RuntimeError: if the engine has no draft of its own.
            ValueError: if `folder` has another draft, see [`DraftRefresh.check_draft`].
            OSError: if `folder` has no safetensors.
        """
        if wrong := self.check_draft(folder):
            raise ValueError(f"{folder} has another draft than the engine's. {' '.join(wrong)}")
        from safetensors.torch import load_file
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        draft, config = self.get_draft_model(), self.vllm_config.speculative_config.draft_model_config
        # All of it, before the first is replaced.
        weights = [weight for file in _files(Path(folder)) for weight in load_file(file).items()]
        with set_current_vllm_config(self.vllm_config):
            # vLLM packs weights for its kernels as it loads them: this unpacks, and finalize packs again, at the same addresses.
            initialize_layerwise_reload(draft)
            try:
                draft.load_weights(weights)
            finally:  # unpacked weights are empty: whatever happens, a draft that can be run
                finalize_layerwise_reload(draft, config)
        return type(draft).__name__


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes of the tensors in a folder's safetensors, of which only the headers are read; empty if it has none."""
    from safetensors import safe_open

    shapes = {}
    for file in _files(folder):
        with safe_open(file, "np") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _other_sizes(serves, file: Path) -> list[str]:
    """Name the sizes in a config.json that differ from those of a config of transformers, as far as both have them."""
    if not file.is_file():
        return []
    given = json.loads(file.read_text(encoding="utf-8"))
    return [
        f"`{name}` is {given[name]} in the folder and {getattr(serves, name)} in the engine."
        for name in _SIZES
        if None not in (given.get(name), getattr(serves, name, None)) and given[name] != getattr(serves, name)
    ]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))
