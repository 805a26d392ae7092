"""`save_state` and `load_state`: what of an assistant goes on after a restart, whose state is refused, and whose prompts go to disk."""

import copy
import json
import logging
import math
import os
import resource
import stat

import pytest
import torch

from hf_osd import OnlineAssistant, grow_draft
from hf_osd.saving.state import saved_progress
from hf_osd.system.files import new_state, newest_state, states

from ..served import GREEDY, PROMPTS, serve

# What is learnt serves at once, and however long learning takes, all is learnt.
AT_ONCE = {"gate": False, "learning_rate": 1e-3, "learning_budget": 1.0}


def weights(assistant):
    return torch.cat([p.flatten() for _, p in assistant.serving.weights()])


@pytest.fixture
def learnt(target, draft):
    """An assistant that has served five requests and learnt from four."""
    assistant = OnlineAssistant(draft, update_interval=2, seed=0, **AT_ONCE)
    serve(target, assistant, PROMPTS[:5])
    assistant.collect()
    return assistant


def test_a_resumed_learner_goes_on_as_if_it_had_not_stopped(target, draft, tmp_path):
    def fresh():
        return OnlineAssistant(draft, update_interval=10**6, seed=3, replay_ratio=0.0, draft_cost=0.2, **AT_ONCE)

    straight, stopped = fresh(), fresh()
    for assistant in (straight, stopped):
        serve(target, assistant, PROMPTS[:4])
        assistant.flush()
    stopped.save_state(tmp_path)
    resumed = fresh()
    resumed.load_state(tmp_path)
    assert resumed.stats.updates == 1
    assert torch.equal(weights(stopped), weights(resumed))
    for assistant in (straight, resumed):
        serve(target, assistant, PROMPTS[4:8])
        assistant.flush()
    assert not torch.equal(weights(stopped), weights(resumed))
    # Not exactly: the order of sums may be another.
    torch.testing.assert_close(weights(straight), weights(resumed), atol=1e-6, rtol=1e-5)


def test_what_was_let_through_serves_again_and_learning_goes_on_from_what_was_not(target, draft, tmp_path):
    config = {"update_interval": 4, "seed": 0, "draft_cost": 0.2, "warmup_steps": 0} | AT_ONCE | {"gate": True}
    assistant, resumed = (OnlineAssistant(draft, **config) for _ in range(2))
    static = weights(resumed)
    for _ in range(8):
        serve(target, assistant)
    assistant.flush()
    assert assistant.stats.accepted_updates > 0
    assistant.save_state(tmp_path)
    resumed.load_state(tmp_path)
    assert torch.equal(weights(resumed), weights(assistant))
    assert not torch.equal(weights(resumed), static)
    for name, learnt in assistant.learner.student.serving_weights().items():
        assert torch.equal(learnt, resumed.learner.student.serving_weights()[name])
    then, now = assistant.stats.to_dict(), resumed.stats.to_dict()
    for name in (
        "updates",
        "accepted_updates",
        "rejected_updates",
        "regret_vs_static",
        "learning_rate",
        "serves_static",
    ):
        assert now[name] == then[name]
    assert now["regret_vs_static"] < 0
    served = weights(resumed)
    serve(target, resumed, PROMPTS[:4])
    resumed.collect()
    assert resumed.flush() or torch.equal(weights(resumed), served)
    assert resumed.stats.failed_updates == 0


LORA = {"adapter": "lora", "lora": 4, "update_interval": 10**6, "seed": 3, "replay_ratio": 0.0, "draft_cost": 0.2}
LORA |= AT_ONCE | {"learning_rate": 1e-4}


def test_a_learner_of_an_adapter_goes_on_as_if_it_had_not_stopped(target, draft, tmp_path):
    straight, stopped = OnlineAssistant(draft, **LORA), OnlineAssistant(draft, **LORA)
    for assistant in (straight, stopped):
        serve(target, assistant, PROMPTS[:4])
        assistant.flush()
    stopped.save_state(tmp_path)
    resumed = OnlineAssistant(draft, **LORA)
    resumed.load_state(tmp_path)
    assert torch.equal(weights(stopped), weights(resumed))
    served = dict(stopped.serving.active.named_parameters())
    assert all(torch.equal(p, served[name]) for name, p in resumed.serving.active.named_parameters())
    for assistant in (straight, resumed):
        serve(target, assistant, PROMPTS[4:8])
        assistant.flush()
    assert not torch.equal(weights(stopped), weights(resumed))
    torch.testing.assert_close(weights(straight), weights(resumed), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("there", "here", "mend"),
    [
        ({"lora": 4}, {"lora": 2}, r"rank 4 learnt, and here a LoRA adapter of rank 2.*adapter='lora', lora=4"),
        ({"lora": 4}, {"adapter": "off"}, r"here all weights does.*adapter='lora', lora=4"),
        ({"adapter": "off"}, {"lora": 4}, r"there all weights learnt.*adapter='off'"),
    ],
)
def test_a_state_of_another_adapter_is_refused_by_its_rank(draft, tmp_path, there, here, mend):
    OnlineAssistant(draft, **LORA | there).save_state(tmp_path)
    other = OnlineAssistant(draft, **LORA | here)
    before = weights(other)
    with pytest.raises(ValueError, match=rf"another draft: .*{mend}"):
        other.load_state(tmp_path)
    assert torch.equal(weights(other), before)


def test_a_state_is_not_put_upon_a_draft_that_has_its_adapter_in_its_weights(target, draft, tmp_path):
    assistant = OnlineAssistant(draft, **LORA)
    serve(target, assistant, PROMPTS[:4])
    assistant.flush()
    assistant.save_pretrained(tmp_path / "draft")
    assistant.save_state(tmp_path / "state")
    again = OnlineAssistant.from_pretrained(tmp_path / "draft")
    with pytest.raises(ValueError, match=r"another draft: .*\(lora=4\) was learnt over other weights"):
        again.load_state(tmp_path / "state")


def test_statistics_go_on(target, draft, learnt, tmp_path):
    serve(target, learnt, [PROMPTS[i % 12] for i in range(55)])  # more than the rolling window
    was = copy.deepcopy(learnt.stats)
    learnt.save_state(tmp_path)
    resumed = OnlineAssistant(draft, update_interval=2, seed=0)
    resumed.load_state(tmp_path)
    now = resumed.stats
    assert (now.total, now.last, now.rolling) == (was.total, was.last, was.rolling)
    assert now.total.requests == 60
    assert (now.updates, now.learned_tokens) == (was.updates, was.learned_tokens)
    serve(target, resumed, PROMPTS[:1])
    assert resumed.stats.total.requests == 61
    assert resumed.stats.rolling.requests == 50


def test_progress_comes_back(draft, learnt, tmp_path):
    learnt.save_state(tmp_path, progress={"at": 5})
    learnt.save_state(tmp_path, progress={"at": 6})
    assert saved_progress(tmp_path) == {"at": 6}
    assert OnlineAssistant(draft).load_state(tmp_path) == {"at": 6}


def test_missing_state_raises(learnt, tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no saved state in"):
            learnt.load_state(place)


def test_an_assistant_that_does_not_learn_keeps_statistics_and_progress(target, draft, tmp_path):
    frozen = OnlineAssistant(draft, learn=False)
    serve(target, frozen, PROMPTS[:3])
    frozen.save_state(tmp_path, progress={"at": 3})
    again = OnlineAssistant(draft, learn=False)
    assert again.load_state(tmp_path) == {"at": 3}
    assert (again.stats.total, again.stats.total.requests) == (frozen.stats.total, 3)


def test_a_state_of_one_that_learns_is_not_one_of_one_that_does_not(draft, learnt, tmp_path):
    learnt.save_state(tmp_path / "learnt")
    frozen = OnlineAssistant(draft, learn=False)
    frozen.save_state(tmp_path / "frozen")
    with pytest.raises(ValueError, match="that learns, and this one does not"):
        frozen.load_state(tmp_path / "learnt")
    with pytest.raises(ValueError, match="did not learn, and this one does"):
        learnt.load_state(tmp_path / "frozen")


def test_a_closed_assistant_neither_saves_nor_loads_a_state(learnt, tmp_path):
    """What it had learnt is gone: its state would push a whole one off the disk."""
    learnt.save_state(tmp_path)
    learnt.close()
    for use in (learnt.save_state, learnt.load_state):
        with pytest.raises(ValueError, match="is closed"):
            use(tmp_path)
    assert len(states(tmp_path)) == 1


def test_numbers_that_json_has_not_come_back_from_json_that_it_has(learnt, tmp_path):
    learnt.save_state(tmp_path, progress={"alpha": math.nan, "best": -math.inf})
    text = (newest_state(tmp_path) / "state.json").read_text()
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    progress = saved_progress(tmp_path)
    assert math.isnan(progress["alpha"])
    assert progress["best"] == -math.inf


def test_a_state_of_another_draft_is_refused(target, learnt, tmp_path):
    learnt.save_state(tmp_path)
    other = OnlineAssistant(grow_draft(target, (0,)))
    before = weights(other)
    with pytest.raises(ValueError, match="another draft"):
        other.load_state(tmp_path)
    assert torch.equal(weights(other), before)
    assert other.stats.total.requests == 0


def test_a_truncated_state_is_refused_and_the_one_before_it_taken(draft, learnt, tmp_path, caplog):
    learnt.save_state(tmp_path, progress=1)
    path = newest_state(tmp_path) / "learner.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assistant = OnlineAssistant(draft)
    with pytest.raises(ValueError, match=r"learner.safetensors is damaged: it has 100 bytes .* start afresh"):
        assistant.load_state(tmp_path)
    learnt.save_state(tmp_path, progress=2)
    learnt.save_state(tmp_path, progress=3)
    path = newest_state(tmp_path) / "learner.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # safetensors itself would not notice
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert assistant.load_state(tmp_path) == 2
    assert f"{path} is damaged" in caplog.text
    assert torch.equal(weights(assistant), weights(learnt))


@pytest.mark.parametrize(
    "values", ["{}", *(f'{{"version": {n}}}' for n in (1, 2, 3)), '{"version": 3, "stats": {"total": {"x": 1}}}']
)
def test_a_state_of_another_version_is_refused(draft, learnt, tmp_path, values):
    learnt.save_state(tmp_path)
    weights_file = (newest_state(tmp_path) / "learner.safetensors").read_bytes()
    with new_state(tmp_path) as folder:
        (folder / "learner.safetensors").write_bytes(weights_file)
        (folder / "state.json").write_text(values)
    with pytest.raises(ValueError, match=r"another version.*start afresh"):
        OnlineAssistant(draft).load_state(tmp_path)


def test_a_full_disk_leaves_the_state_and_serving(target, draft, learnt, tmp_path):
    """A real refusal of the system, not of a mock: safetensors meets it in its own code and has an error of its own for it."""
    learnt.save_state(tmp_path, progress="whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"Cannot save to .*too large.*unchanged; free space"):
            learnt.save_state(tmp_path, progress="half")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000001"]
    assert OnlineAssistant(draft).load_state(tmp_path) == "whole"
    [output] = serve(target, learnt, PROMPTS[:1])
    assert torch.equal(output, target.generate(PROMPTS[0], **GREEDY))
    learnt.save_state(tmp_path, progress="again")
    assert saved_progress(tmp_path) == "again"


def test_a_place_that_cannot_be_written_is_named(learnt, tmp_path):
    """A file in the way stops root too, unlike a mode."""
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=f"Cannot save to {tmp_path / 'file'}"):
        learnt.save_state(tmp_path / "file")


# What is written of the prompts.


def test_feedback_is_written_only_when_asked_and_for_its_owner_alone(draft, learnt, tmp_path):
    learnt.save_state(tmp_path / "state")
    assert sorted(p.name for p in newest_state(tmp_path / "state").iterdir()) == [
        "learner.safetensors",
        "manifest.json",
        "state.json",
    ]
    learnt.save_state(tmp_path / "asked", with_buffer=True)
    folder = newest_state(tmp_path / "asked")
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(folder / "buffer.safetensors").st_mode) == 0o600
    restored = OnlineAssistant(draft)
    restored.load_state(tmp_path / "asked")
    assert [f.tokens.tolist() for f in restored.buffer.sample(9)] != []
    assert len(restored.buffer) == len(learnt.buffer) == 5
    assert len(restored.buffer.new()) == len(learnt.buffer.new()) == 1


def test_a_state_without_prompts_takes_those_of_older_ones_off_the_disk(learnt, tmp_path):
    learnt.save_state(tmp_path, with_buffer=True)
    learnt.save_state(tmp_path, with_buffer=True)
    assert len(states(tmp_path)) == 2
    learnt.save_state(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000003"]
    assert not list(tmp_path.rglob("buffer*"))
    learnt.save_state(tmp_path)
    assert len(states(tmp_path)) == 2


def test_what_prompts_have_taught_is_known_after_a_restart_where_asked(target, draft, tmp_path):
    def fresh():
        return OnlineAssistant(draft, update_interval=10**6, seed=0)

    assistant, restored, without = fresh(), fresh(), fresh()
    serve(target, assistant, PROMPTS[:9])
    assistant.save_state(tmp_path / "state")
    assistant.save_state(tmp_path / "asked", with_buffer=True)
    restored.load_state(tmp_path / "asked")
    without.load_state(tmp_path / "state")
    for p in PROMPTS[:9]:
        assert assistant.seen_texts.shared_prefix(p[0]) == restored.seen_texts.shared_prefix(p[0]) == len(p[0])
        assert without.seen_texts.shared_prefix(p[0]) == 0


def test_a_state_is_plain_values_and_safetensors(learnt, tmp_path):
    learnt.save_state(tmp_path, with_buffer=True)
    folder = newest_state(tmp_path)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert json.loads((folder / "state.json").read_text())["version"] == 3
