"""Routes that are saved come back, and what cannot be loaded says why."""

import json

import pytest
import torch

from hf_osd import RoutedAssistant, grow_draft
from hf_osd.saving.routes import POOL_NAME

from .calls import LEARNS, prompts, serve


@pytest.mark.parametrize("kind", ["grown", "adapter"])
def test_a_saved_pool_comes_back(target, tmp_path, kind):
    extra = {"adapter": "lora", "lora": 4} if kind == "adapter" else {}
    assistant = RoutedAssistant(grow_draft(target), max_routes=3, topic_requests=40, **LEARNS, **extra)
    for prompt in prompts(4):
        serve(target, assistant.route("a/b"), prompt)
        serve(target, assistant, prompt)
    assistant.flush()
    assistant.save_pretrained(tmp_path / "pool")
    again = RoutedAssistant.from_pretrained(tmp_path / "pool")
    assert (again.max_routes, again.router.own_from) == (3, 40)
    assert again.router.routes == assistant.router.routes
    for name, one in assistant.pool.items():
        old, new = dict(one.serving.weights()), dict(again.pool.peek(name).serving.weights())
        assert all(torch.equal(old[key], new[key]) for key in old)
    serve(target, again.route("a/b"), prompts(1)[0])
    assistant.save_route("a/b", tmp_path / "one")
    assert (tmp_path / "one" / "model.safetensors").is_file()


@pytest.mark.parametrize("away", [False, True])
def test_a_loaded_router_has_no_route_whose_weights_are_not_there(target, tmp_path, away):
    folder = tmp_path / "away"
    assistant = RoutedAssistant(grow_draft(target), max_routes=2, pool_folder=folder, **LEARNS)
    for prompt in prompts(4):
        serve(target, assistant, prompt)
    assistant.flush()
    [topical] = assistant.router.routes
    for name in "ab":  # which put it away
        serve(target, assistant.route(name), prompts(1)[0])
    assert topical not in assistant.pool
    assistant.save_pretrained(tmp_path / "pool")
    again = RoutedAssistant.from_pretrained(tmp_path / "pool", pool_folder=folder if away else None)
    assert again.router.routes == ((topical,) if away else ())
    serve(target, again, prompts(1)[0])
    [serving] = again.router.routes
    assert (again.pool.peek(serving).serving.version > 0) == away


def test_what_cannot_be_loaded_says_why(target, tmp_path, tiny_llama):
    assistant = RoutedAssistant(grow_draft(target), routes="named", **LEARNS)
    for prompt in prompts(2):
        serve(target, assistant.route("a"), prompt)
    assistant.flush()
    assistant.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another draft"):
        RoutedAssistant.from_pretrained(tmp_path, draft=grow_draft(tiny_llama(layers=4, seed=5)))
    with pytest.raises(ValueError, match="have learnt in all weights"):
        RoutedAssistant.from_pretrained(tmp_path, config=type(assistant.osd_config)(adapter="lora", seed=0))
    facts = json.loads((tmp_path / POOL_NAME).read_text())
    (tmp_path / POOL_NAME).write_text(json.dumps({**facts, "version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        RoutedAssistant.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no pool of drafts"):
        RoutedAssistant.from_pretrained(_single(assistant, tmp_path / "single"))
    with pytest.raises(ValueError, match="no route 'c'"):
        assistant.save_route("c", tmp_path / "c")


def _single(assistant, folder):
    assistant.save_route("a", folder)
    return folder
