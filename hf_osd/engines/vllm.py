"""`DraftRefresh` replaces the draft of a running vLLM engine by newer weights. docs/engines.md has the commands."""

from __future__ import annotations

from pathlib import Path


class DraftRefresh:
    """Replaces the weights of the speculative draft in place.

    vLLM (0.32) mixes this class into its workers with `--worker-extension-cls hf_osd.engines.vllm.DraftRefresh`.
    """

    def refresh_draft(self, folder: str) -> str:
        """Load the safetensors of `folder` into the draft, in place; return the class name of the draft's module.

        The draft must have the architecture, sizes and dtype of the one that the engine was started with. Call it while no request
        runs, and reset the prefix cache afterwards: the old weights computed what it holds, which costs acceptance and never changes the output.

        Args:
            folder (`str`): a folder that `save_pretrained` wrote, on the worker's machine.

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
