"""A new draft for a vLLM engine that runs, by a stand-in for what vLLM has: what is loaded, in which order, and what is refused."""

import json
import subprocess
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from hf_osd.engines.vllm import DraftRefresh


@pytest.fixture
def worker(monkeypatch):
    """A worker with a draft, and `worker.seen`: what was done to it."""
    seen = []

    @contextmanager
    def set_current_vllm_config(config):
        seen.append(config)
        try:
            yield
        finally:
            seen.append("left")

    class Draft:
        fails = False

        def load_weights(self, weights):
            if self.fails:
                raise RuntimeError("out of memory")
            seen.append(dict(weights))

    config = SimpleNamespace(model="me/on-the-hub", hf_config=SimpleNamespace(hidden_size=2, tie_word_embeddings=True))

    class Worker(DraftRefresh):
        vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(draft_model_config=config))

        def get_draft_model(self):
            return self.draft

    names = ("vllm", "vllm.config", "vllm.model_executor", "vllm.model_executor.model_loader")
    reload = "vllm.model_executor.model_loader.reload"
    made = {name: ModuleType(name) for name in (*names, reload)}
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    made["vllm.config"].set_current_vllm_config = set_current_vllm_config
    made[reload].initialize_layerwise_reload = lambda draft: seen.append("unpacked")
    made[reload].finalize_layerwise_reload = lambda draft, config: seen.append(("packed", config))
    worker = Worker()
    worker.draft, worker.seen, worker.config = Draft(), seen, config
    return worker


def test_all_weights_of_the_folder_are_loaded_between_unpacking_and_packing(worker, tmp_path):
    for i in (1, 2):
        save_file({f"weight{i}": torch.full((2,), float(i))}, tmp_path / f"model-{i}-of-2.safetensors")
    assert worker.refresh_draft(str(tmp_path)) == "Draft"
    config, unpacked, loaded, packed, left = worker.seen
    assert config is worker.vllm_config
    assert (unpacked, packed, left) == ("unpacked", ("packed", worker.config), "left")
    assert {name: weight.tolist() for name, weight in loaded.items()} == {"weight1": [1.0] * 2, "weight2": [2.0] * 2}


def test_an_engine_without_a_draft_and_a_folder_without_weights_are_refused_untouched(worker, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No \*\.safetensors in .*save_pretrained"):
        worker.refresh_draft(str(tmp_path))
    worker.draft = None
    with pytest.raises(RuntimeError, match="has no draft"):
        worker.refresh_draft(str(tmp_path))
    assert not worker.seen


def saved(folder, config=None, **shapes):
    """Write a draft of tensors of these shapes."""
    folder.mkdir(exist_ok=True)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_another_draft_is_refused_before_the_first_weight_is_replaced(worker, tmp_path):
    worker.config.model = saved(tmp_path / "old", a=(2, 3), b=(2,), c=(4,))
    new = saved(tmp_path / "new", a=(2, 3), b=(3,), d=(1, 1))
    wrong = worker.check_draft(new)
    assert wrong == [
        "The tensor b is 3 in the folder and 2 in the engine.",
        "The tensor c is missing in the folder and 4 in the engine.",
        "The tensor d is 1x1 in the folder and missing in the engine.",
    ]
    with pytest.raises(ValueError, match=r"another draft than the engine's\. The tensor b is 3"):
        worker.refresh_draft(new)
    assert not worker.seen


def test_other_sizes_are_named_also_where_the_old_files_are_gone(worker, tmp_path):
    new = saved(tmp_path / "new", {"hidden_size": 4, "head_dim": None, "vocab_size": 9}, a=(2,))
    assert worker.check_draft(new) == ["`hidden_size` is 4 in the folder and 2 in the engine."]
    assert worker.check_draft(saved(tmp_path / "new", {"hidden_size": 2}, a=(2,))) == []


def test_many_differences_are_counted(worker, tmp_path):
    worker.config.model = saved(tmp_path / "old", **{f"w{i}": (2,) for i in range(9)})
    wrong = worker.check_draft(saved(tmp_path / "new", **{f"w{i}": (3,) for i in range(9)}))
    assert len(wrong) == 6
    assert wrong[-1] == "And 4 others."


def test_what_some_files_have_twice_is_no_difference(worker, tmp_path):
    worker.config.model = saved(tmp_path / "old", a=(2,), **{"lm_head.weight": (9,), "rotary.inv_freq": (3,)})
    assert worker.check_draft(saved(tmp_path / "new", a=(2,))) == []
    worker.config.hf_config.tie_word_embeddings = False
    assert len(worker.check_draft(str(tmp_path / "new"))) == 1


def test_what_the_engine_was_started_with_may_go(worker, tmp_path):
    worker.config.model = saved(tmp_path / "old", a=(2,))
    assert worker.check_draft(worker.config.model) == []
    (tmp_path / "old" / "model.safetensors").unlink()
    assert len(worker.check_draft(saved(tmp_path / "new", a=(3,)))) == 1


def test_a_file_that_is_cut_short_replaces_nothing(worker, tmp_path):
    new = saved(tmp_path / "new", a=(200,))
    whole = (tmp_path / "new" / "model.safetensors").read_bytes()
    (tmp_path / "new" / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(SafetensorError):
        worker.refresh_draft(new)
    assert not worker.seen


def test_a_load_that_fails_leaves_a_draft_that_can_be_run(worker, tmp_path):
    worker.draft.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        worker.refresh_draft(saved(tmp_path / "new", a=(2,)))
    assert worker.seen[-2:] == [("packed", worker.config), "left"]


def test_it_needs_vllm_alone():
    """vLLM's environment brings its own transformers, and may lack trl."""
    code = "import sys; import hf_osd.engines.vllm; print({'torch', 'transformers', 'trl', 'safetensors'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
