"""Routes that are put away serve again what they had learnt, and learn on."""

import threading

import pytest
import torch

from hf_osd import RoutedAssistant, grow_draft

from .calls import LEARNS, prompts, serve


def test_a_route_that_was_put_away_serves_what_it_had_learnt(target, tmp_path):
    assistant = RoutedAssistant(
        grow_draft(target), routes="named", max_routes=1, pool_folder=tmp_path / "away", **LEARNS
    )
    for prompt in prompts(3):
        serve(target, assistant.route("a"), prompt)
    assistant.flush()
    learnt = {name: weight.clone() for name, weight in assistant.pool.peek("a").serving.weights()}
    serve(target, assistant.route("b"), prompts(1)[0])
    assert "a" not in assistant.pool
    assert "Put away: a." in assistant.report()
    serve(target, assistant.route("a"), prompts(1)[0])
    back = dict(assistant.pool.peek("a").serving.weights())
    assert all(torch.equal(back[name], weight) for name, weight in learnt.items())
    assistant.collect()
    assert assistant.stats.by_route["a"].total.requests == 4, "before and after"
    assert assistant.stats.total.requests == 5
    with pytest.raises(ValueError, match="another draft"):
        RoutedAssistant(grow_draft(target, (1, 2)), routes="named", pool_folder=tmp_path / "away")
    again = RoutedAssistant(grow_draft(target), routes="named", pool_folder=tmp_path / "away", **LEARNS)
    serve(target, again.route("a"), prompts(1)[0])
    restarted = dict(again.pool.peek("a").serving.weights())
    assert all(torch.equal(restarted[name], weight) for name, weight in learnt.items()), "in another process too"


@pytest.mark.parametrize(
    "settings", [{"adapter": "lora", "lora": 4}, {"learn": "background", "learning_rate": "auto"}]
)
def test_a_route_that_was_put_away_goes_on_learning_from_there(target, tmp_path, settings):
    settings = {**LEARNS, "gate": True, **settings}
    assistant = RoutedAssistant(grow_draft(target), routes="named", max_routes=1, pool_folder=tmp_path, **settings)
    for prompt in prompts(8):
        serve(target, assistant.route("a"), prompt)
    assistant.flush()
    tensors, values = assistant.pool.peek("a").learner.state()
    updates = assistant.stats.updates
    assert updates
    assert values["rate"]["found"]
    assistant.pool.get("b")
    assistant.collect()
    assert assistant.stats.updates == updates
    learner = assistant.pool.get("a").learner
    back, its_values = learner.state()
    assert back.keys() == tensors.keys()
    assert any("optimizer" in name for name in back)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items() if not name.endswith("draws"))
    assert its_values == values
    assert assistant.stats.updates == updates, "counted once"
    assert assistant.stats.total.requests == 8
    for prompt in prompts(4, seed=1):
        serve(target, assistant.route("a"), prompt)
    assistant.flush()
    assert assistant.stats.updates > updates
    assistant.close()


def test_a_route_is_put_away_while_another_one_learns(target, tmp_path):
    assistant = RoutedAssistant(grow_draft(target), routes="named", max_routes=1, pool_folder=tmp_path, **LEARNS)
    for prompt in prompts(2):
        serve(target, assistant.route("a"), prompt)
    assistant.flush()
    with assistant._shared.learning:
        thread = threading.Thread(target=assistant.pool.get, args=("b",), daemon=True)
        thread.start()
        thread.join(60)
        assert not thread.is_alive()
    assert "b" in assistant.pool


def test_a_learner_of_another_kind_goes_on_from_the_weights_that_were_put_away(target, tmp_path, caplog):
    settings = {**LEARNS, "pool_folder": tmp_path, "routes": "named", "max_routes": 1}
    assistant = RoutedAssistant(grow_draft(target), **settings)
    for prompt in prompts(4):
        serve(target, assistant.route("a"), prompt)
    assistant.flush()
    learnt = {name: weight.clone() for name, weight in assistant.pool.peek("a").serving.weights()}
    assistant.pool.get("b")
    for other in ({"ensemble": [1.0, 2.0]}, {"learn": False}):
        again = RoutedAssistant(grow_draft(target), **{**settings, **other})
        back = dict(again.pool.get("a").serving.weights())
        assert all(torch.equal(back[name], weight) for name, weight in learnt.items())
        assert again.stats.updates == 0
    assert "with a new learner" in caplog.text
