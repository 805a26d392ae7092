"""A new draft for a vLLM engine that runs, by a stand-in for what vLLM has: what is loaded, in which order, and what is refused."""

import subprocess
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from hf_osd.engines.vllm import DraftRefresh


@pytest.fixture
def worker(monkeypatch):
    """A worker with a draft, and `worker.seen`: what was done to it."""
    seen = []

    @contextmanager
    def set_current_vllm_config(config):
        seen.append(config)
        yield
        seen.append("left")

    class Draft:
        def load_weights(self, weights):
            seen.append(dict(weights))

    class Worker(DraftRefresh):
        vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config="the draft's"))

        def get_draft_model(self):
            return self.draft

    names = ("vllm", "vllm.config", "vllm.model_executor", "vllm.model_executor.model_loader")
    reload = "vllm.model_executor.model_loader.reload"
    made = {name: ModuleType(name) for name in (*names, reload)}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    made["vllm.config"].set_current_vllm_config = set_current_vllm_config
    made[reload].initialize_layerwise_reload = lambda draft: seen.append("unpacked")
    made[reload].finalize_layerwise_reload = lambda draft, config: seen.append(f"packed by {config} config")
    worker = Worker()
    worker.draft, worker.seen = Draft(), seen
    return worker


def test_all_weights_of_the_folder_are_loaded_between_unpacking_and_packing(worker, tmp_path):
    for i in (1, 2):
        save_file({f"weight{i}": torch.full((2,), float(i))}, tmp_path / f"model-{i}-of-2.safetensors")
    assert worker.refresh_draft(str(tmp_path)) == "Draft"
    config, unpacked, loaded, packed, left = worker.seen
    assert config is worker.vllm_config
    assert (unpacked, packed, left) == ("unpacked", "packed by the draft's config", "left")
    assert {name: weight.tolist() for name, weight in loaded.items()} == {"weight1": [1.0] * 2, "weight2": [2.0] * 2}


def test_an_engine_without_a_draft_and_a_folder_without_weights_are_refused_untouched(worker, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No \*\.safetensors in .*save_pretrained"):
        worker.refresh_draft(str(tmp_path))
    worker.draft = None
    with pytest.raises(RuntimeError, match="has no draft"):
        worker.refresh_draft(str(tmp_path))
    assert not worker.seen


def test_it_needs_vllm_alone():
    """vLLM's environment brings its own transformers, and may lack trl."""
    code = "import sys; import hf_osd.engines.vllm; print({'torch', 'transformers', 'trl', 'safetensors'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
