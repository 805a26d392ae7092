"""`DraftRefresh`: the draft of a vLLM engine that runs, replaced by one that has learnt on. docs/engines.md has the commands."""

from __future__ import annotations

from pathlib import Path


class DraftRefresh:
    """What vLLM (0.32) mixes into its workers, as `--worker-extension-cls hf_osd.engines.vllm.DraftRefresh`: the speculative draft's weights are replaced in place."""

    def refresh_draft(self, folder: str) -> str:
        """Load the safetensors of `folder` into the draft, in place; the class of the module they went into.

        The draft must have the architecture, sizes and dtype of the one that the engine was started with. Call it while no request
        runs, and reset the prefix cache afterwards: what is in it was computed by the old weights, which costs acceptance, never the output.

        Args:
            folder (`str`): what `save_pretrained` wrote, on the worker's machine.

        Raises:
            RuntimeError: if the engine has no draft of its own.
            OSError: if `folder` has no safetensors.
        """
        from safetensors.torch import load_file
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        draft = self.get_draft_model()
        if draft is None:
            raise RuntimeError("The engine has no draft: start it with a `speculative_config` of method draft_model.")
        if not (files := sorted(Path(folder).glob("*.safetensors"))):
            raise FileNotFoundError(f"No *.safetensors in {folder}: give the folder that save_pretrained wrote.")
        config = self.vllm_config.speculative_config.draft_model_config
        with set_current_vllm_config(self.vllm_config):
            # vLLM packs weights for its kernels as it loads them: this unpacks, and finalize packs again, at the same addresses.
            initialize_layerwise_reload(draft)
            draft.load_weights(weight for file in files for weight in load_file(file).items())
            finalize_layerwise_reload(draft, config)
        return type(draft).__name__
