"""`HotSwapDraft`: refreshes flip to a new copy, and no copy is ever written."""

import gc
import weakref

import pytest
import torch

from hf_osd.models.copies import copy_draft, embedding_names
from hf_osd.models.hot_swap import HotSwapDraft

IDS = torch.arange(2, 12)[None]


def trainable_of(model):
    return {name for name, _ in model.named_parameters()} - embedding_names(model)


def moved(serving, by):
    """The trainable weights, each moved by `by`."""
    return {name: tensor + by for name, tensor in serving.weights()}


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}


def same(model, weights):
    return all(torch.equal(p, weights[name]) for name, p in model.named_parameters(remove_duplicate=False))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def draft(tiny_llama):
    return tiny_llama(layers=1)


@pytest.fixture
def serving(draft):
    return HotSwapDraft(draft, trainable_of(draft))


def test_a_refresh_serves_the_new_weights_from_the_next_lease_on(serving, draft):
    for version in (1, 2, 3):
        weights = moved(serving, 0.125)
        serving.refresh(weights)
        assert serving.version == version
        leased = serving.lease()
        for name, parameter in leased.named_parameters():
            assert name not in weights or torch.equal(parameter, weights[name]), name
        serving.release(leased)
    assert not torch.equal(logits(serving.active), logits(draft)), "the forward runs the new weights"


def test_the_given_draft_is_left_as_it_was(draft):
    before = snapshot(draft)
    draft.train()
    serving = HotSwapDraft(draft, trainable_of(draft))
    serving.refresh(moved(serving, 1.0))
    assert same(draft, before)
    assert draft.training
    assert all(p.requires_grad for p in draft.parameters())


def test_served_copies_infer_and_do_not_train(draft):
    draft.train()  # with dropout it would draft at random
    serving = HotSwapDraft(draft, trainable_of(draft))
    for _ in range(2):
        assert not serving.active.training
        assert not any(p.requires_grad for p in serving.active.parameters())
        serving.refresh(moved(serving, 0.1))


def test_a_leased_copy_never_changes(serving):
    """Weights that change under a call's KV cache make it draft from nowhere."""
    leased = serving.lease()
    before, said = snapshot(leased), logits(leased)
    for _ in range(4):
        serving.refresh(moved(serving, 0.5))
    assert same(leased, before)
    assert torch.equal(logits(leased), said)


def test_copies_that_older_calls_still_lease_are_left_alone(serving):
    older = serving.lease()
    serving.refresh(moved(serving, 0.5))
    younger = serving.lease()
    assert younger is not older
    before = [snapshot(model) for model in (older, younger)]
    serving.refresh(weights := moved(serving, 0.5))
    serving.refresh(moved(serving, 0.5))
    assert same(older, before[0])
    assert same(younger, before[1])
    assert serving.active not in (older, younger)
    assert not any(torch.equal(p, weights[n]) for n, p in older.named_parameters() if n in weights)
    for model in (older, younger):
        serving.release(model)
    leased = serving.lease()
    assert leased is serving.active
    serving.release(leased)


def test_an_old_copy_goes_with_the_last_call_that_holds_it(serving):
    first, second = serving.lease(), serving.lease()
    assert first is second
    serving.refresh(moved(serving, 0.1))
    assert serving.active is not first
    gone = weakref.ref(first)
    for leased in (first, second):
        serving.release(leased)
    del first, second, leased
    gc.collect()
    assert gone() is None
    learnt = sum(p.nbytes for name, p in serving.active.named_parameters() if name in serving.trainable)
    for _ in range(3):
        serving.refresh(moved(serving, 0.1))
        assert serving.own_bytes() == learnt


def test_frozen_weights_share_the_drafts_storage_and_trainable_ones_do_not(serving, draft):
    given = dict(draft.named_parameters())
    trainable = trainable_of(draft)
    older = serving.lease()
    serving.refresh(moved(serving, 0.1))
    younger = serving.active
    serving.refresh(moved(serving, 0.1))
    for copy in (younger, serving.active):
        for name, parameter in copy.named_parameters():
            shared = parameter.data_ptr() == given[name].data_ptr()
            assert shared == (name not in trainable), name
    serving.release(older)


def test_a_draft_that_has_learnt_nothing_takes_no_memory(serving, draft):
    given = {name: p.data_ptr() for name, p in draft.named_parameters()}
    older = serving.active
    assert {name: p.data_ptr() for name, p in older.named_parameters()} == given
    assert serving.own_bytes() == 0
    serving.refresh(moved(serving, 0.1))
    assert {name: p.data_ptr() for name, p in older.named_parameters()} == given
    active = serving.active
    assert {name for name, p in active.named_parameters() if p.data_ptr() != given[name]} == trainable_of(draft)


def test_a_copy_that_broke_off_half_written_is_written_whole_by_the_next_refresh(serving, monkeypatch):
    """A device that is full in the middle of it, say."""
    before = snapshot(serving.active)
    weights = moved(serving, 0.25)

    class BreaksOff(dict):
        read = 0

        def __getitem__(self, name):
            self.read += 1
            if self.read == 3:
                raise RuntimeError("out of memory")
            return super().__getitem__(name) + 1

    with monkeypatch.context() as patch:
        patch.setattr("hf_osd.models.copies.check_weights", lambda *_: None)
        with pytest.raises(RuntimeError, match="out of memory"):
            serving.refresh(BreaksOff(weights))
    assert same(serving.active, before)
    assert serving.version == 0
    serving.refresh(weights)
    assert all(torch.equal(p, weights[name]) for name, p in serving.weights())


def lacking(weights):
    return {name: tensor for name, tensor in weights.items() if "mlp" not in name}


def misshapen(weights):
    return {name: torch.cat([tensor, tensor]) for name, tensor in weights.items()}


def not_a_number(weights):
    last = list(weights)[-1]
    return {**weights, last: torch.full_like(weights[last], torch.nan)}


def infinite(weights):
    last = list(weights)[-1]
    return {**weights, last: weights[last].clone().fill_(torch.inf)}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lacking, "lack .*mlp"),
        (misshapen, "in the new weights and .* in the draft"),
        (not_a_number, "not finite"),
        (infinite, "not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_whole(serving, spoil, says):
    serving.refresh(moved(serving, 0.1))
    active, before = serving.active, snapshot(serving.active)
    with pytest.raises(ValueError, match=says):
        serving.refresh(spoil(moved(serving, 0.5)))
    assert serving.active is active
    assert serving.version == 1
    assert same(active, before)
    serving.refresh(moved(serving, 0.5))
    assert serving.version == 2, "and the next good refresh goes through"


def test_weights_that_overflow_the_serving_dtype_are_refused(tiny_llama):
    """A diverged float32 learner: 1e5 is finite there, and infinite in the float16 that serves."""
    draft = tiny_llama(layers=1).to(torch.float16)
    serving = HotSwapDraft(draft, trainable_of(draft))
    with pytest.raises(ValueError, match="not finite"):
        serving.refresh({name: tensor.float() + 1e5 for name, tensor in serving.weights()})
    assert serving.version == 0


def test_float32_weights_are_served_in_the_drafts_dtype(tiny_llama):
    draft = tiny_llama(layers=1).to(torch.bfloat16)
    serving = HotSwapDraft(draft, trainable_of(draft))
    weights = {name: tensor.float() + 0.3 for name, tensor in serving.weights()}
    serving.refresh(weights)
    for name, served in serving.weights():
        assert served.dtype == torch.bfloat16
        assert torch.equal(served, weights[name].bfloat16())


def test_a_refresh_works_under_inference_mode(serving):
    """Users generate under inference_mode, and an update may be due then."""
    weights = moved(serving, 0.25)
    with torch.inference_mode():
        serving.refresh(weights)
    serving.refresh(moved(serving, 0.25))
    assert serving.version == 2


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_names_are_those_of_both_ends(tiny_llama, tied):
    model = tiny_llama(layers=1, tie_word_embeddings=tied)
    assert embedding_names(model) == {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_copy_of_tied_embeddings_is_tied(tiny_llama, frozen):
    """Copied apart, the head would train and the embeddings would not, and a save would drop one of them."""
    model = tiny_llama(layers=1, tie_word_embeddings=True)
    copy = copy_draft(model, embedding_names(model) if frozen else set())
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert (copy.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()) == frozen
    assert torch.equal(logits(copy), logits(model))


def test_a_copy_shares_what_needs_no_gradient_unless_told_otherwise(draft):
    draft.model.norm.weight.requires_grad_(False)
    copy = copy_draft(draft)
    assert copy.model.norm.weight.data_ptr() == draft.model.norm.weight.data_ptr()
    assert not copy.model.norm.weight.requires_grad
    assert copy.lm_head.weight.data_ptr() != draft.lm_head.weight.data_ptr()
    assert copy.lm_head.weight.requires_grad
    whole = copy_draft(draft, frozen=set())
    assert whole.model.norm.weight.data_ptr() != draft.model.norm.weight.data_ptr()
