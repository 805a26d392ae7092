"""The copying head of a grown feature-level draft: it continues repetitions before anything was learnt, and comes where it can be written down alone."""

import threading

import pytest
import torch

from hf_osd import grow_feature_draft
from hf_osd.models import copying_head, feature_growth
from hf_osd.models.copying_head import states_of_random_tokens

VOCAB, LENGTH = 256, 20


@pytest.fixture(scope="module")
def wide(tiny_llama):
    """Makes targets whose first states show which token they are of, as trained models' do."""

    def make(**config):
        settings = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.02, "layers": 4, "vocab": VOCAB}
        return tiny_llama(**settings | config)

    return make


def predicted(draft, target, ids):
    """The draft's likeliest token after each column of `ids` `(B, T)`, which is predicted from the second on: `(B, T-1)`."""
    with torch.no_grad():
        states = target(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        features = torch.cat([states[i] for i in draft.config.aux_layers], -1)
        return draft(input_ids=ids[:, 1:], features=features[:, :-1]).logits.argmax(-1)


def copied(draft, target) -> float:
    """How often the draft continues the second half of texts that say everything twice."""
    ids = torch.randint(2, VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids, ids], 1)
    likeliest = predicted(draft, target, ids)
    return float((likeliest[:, LENGTH:-1] == ids[:, LENGTH + 2 :]).float().mean())


@pytest.mark.parametrize("fc_norm", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_grown_draft_continues_what_was_said_before(wide, monkeypatch, tied, fc_norm):
    target = wide(tie_word_embeddings=tied)
    assert copied(grow_feature_draft(target, fc_norm=fc_norm), target) > 0.5
    monkeypatch.setattr(feature_growth, "install_copying_head", lambda *args: False)
    assert copied(grow_feature_draft(target, fc_norm=fc_norm), target) < 0.1


def test_all_else_is_as_it_would_be_without(wide, monkeypatch):
    """But for the last group of heads, and the directions of the stream that are the head's own."""
    target = wide()
    draft = grow_feature_draft(target)
    monkeypatch.setattr(feature_growth, "install_copying_head", lambda *args: False)
    found, plain = draft.state_dict(), grow_feature_draft(target).state_dict()
    half, changed = 64, {"fc.weight"}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weights = [one[f"midlayer.self_attn.{name}.weight"] for one in (found, plain)]
        kept = [w[:, :half] if name == "o_proj" else w[: len(w) // 2] for w in weights]
        assert torch.equal(*kept)
        changed.add(f"midlayer.self_attn.{name}.weight")
    assert {name for name in found if not torch.equal(found[name], plain[name])} == changed
    place = torch.eye(128) - found["fc.weight"][:, -128:]
    torch.testing.assert_close(place @ place, place, rtol=0, atol=1e-5)
    assert 2 <= round(float(place.trace())) <= 32
    beside = found["fc.weight"][:, :-128]
    torch.testing.assert_close(place @ beside, beside, rtol=1e-4, atol=1e-5)


def test_it_does_not_matter_how_far_back(wide):
    target = wide()
    draft = grow_feature_draft(target)
    ids = torch.randint(2, VOCAB - 1, (8, 150), generator=torch.Generator().manual_seed(0))
    ids[:, 10], ids[:, -1] = VOCAB - 1, VOCAB - 1  # nowhere else
    assert (predicted(draft, target, ids)[:, -1] == ids[:, 11]).float().mean() > 0.5


def test_where_states_do_not_show_their_token_there_is_none(tiny_llama, monkeypatch):
    """A random target of a large scale, whose first layers leave nothing of a token; and one group of heads, all of which the copied attention needs."""
    installed = []
    real = feature_growth.install_copying_head
    monkeypatch.setattr(feature_growth, "install_copying_head", lambda *args: installed.append(real(*args)))
    grow_feature_draft(tiny_llama(layers=4, initializer_range=0.3))
    grow_feature_draft(tiny_llama(layers=4, initializer_range=0.02, num_key_value_heads=1))
    assert installed == [False, False]


def test_the_target_is_left_as_it_was(wide):
    """In its mode, without hooks, and not stopped where another thread runs it meanwhile."""
    target = wide().train()
    layer, answers = target.model.layers[1], []
    plain = layer.forward

    def meanwhile(*args, **kwargs):
        if not answers and threading.current_thread() is threading.main_thread():
            answers.append(None)
            other = threading.Thread(target=lambda: answers.append(target(input_ids=torch.arange(4)[None]).logits))
            other.start()
            other.join(timeout=30)
        return plain(*args, **kwargs)

    layer.forward = meanwhile
    ids, states = states_of_random_tokens(target, 2)
    del layer.forward
    assert states.shape == (len(ids), 128)
    assert answers[1].shape == (1, 4, VOCAB)
    assert target.training
    assert not layer._forward_hooks


def test_its_states_are_those_that_the_draft_reads(wide):
    target = wide()
    ids, states = states_of_random_tokens(target, 2)
    # The first token of each text is not kept: it is among those drawn.
    drawn = torch.randint(VOCAB, (64, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ids, drawn[:, 1:].flatten())
    with torch.no_grad():
        expected = target(input_ids=drawn, output_hidden_states=True).hidden_states[2][:, 1:].flatten(0, 1)
    torch.testing.assert_close(states, expected, atol=1e-5, rtol=1e-4)


def test_a_target_whose_first_layers_cannot_run_alone_grows_a_draft_without(wide, monkeypatch):
    target = wide()

    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(target.model.layers[1], "forward", fails)
    assert states_of_random_tokens(target, 2) is None
    assert states_of_random_tokens(target, 0) is None
    assert grow_feature_draft(target) is not None


@pytest.mark.parametrize("case", ["one group", "not finite in float16", "no decomposition"])
def test_where_it_cannot_be_written_down_nothing_is_changed(wide, monkeypatch, case):
    target = wide(num_key_value_heads=1 if case == "one group" else 2)
    with monkeypatch.context() as patch:
        patch.setattr(feature_growth, "install_copying_head", lambda *args: False)
        expected = grow_feature_draft(target).state_dict()
    if case == "not finite in float16":
        monkeypatch.setattr(copying_head, "_BOOST", 1e8)
        target.half()
        expected = {name: value.half() for name, value in expected.items()}
    elif case == "no decomposition":

        def fails(*args):
            raise torch.linalg.LinAlgError("did not converge")

        monkeypatch.setattr(torch.linalg, "eigh", fails)
    found = grow_feature_draft(target).state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-3, atol=1e-3, msg=name)
