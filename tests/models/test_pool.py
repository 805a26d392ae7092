"""The pool of drafts: what is kept, what goes first, and where it goes."""

import logging

import pytest
import torch

from hf_osd.models.copies import copy_draft
from hf_osd.models.hot_swap import HotSwapDraft
from hf_osd.models.lora import Adapter
from hf_osd.models.pool import DraftPool, file_name, route_bytes


class Member:
    def __init__(self, draft, weights, adapter=None):
        trainable = {name for name, _ in draft.named_parameters() if "mlp" in name}
        self.serving, self.learner = HotSwapDraft(draft, trainable, adapter), None
        if weights is not None:
            self.serving.refresh(weights)


@pytest.fixture
def draft(tiny_llama):
    return tiny_llama()


def moved(member, by):
    member.serving.refresh({name: weight + by for name, weight in member.serving.weights()})


def test_the_one_used_least_recently_is_put_away_and_comes_back_as_it_was(draft, tmp_path):
    gone = []
    pool = DraftPool(lambda name, w: Member(draft, w), 2, None, tmp_path / "away", lambda *what: gone.append(what))
    for i, name in enumerate("ab"):
        moved(pool.get(name), i + 1)
    learnt = {name: weight.clone() for name, weight in pool.get("a").serving.weights()}
    pool.get("c")
    assert [(name, kept) for name, _, kept in gone] == [("b", True)]
    pool.get("d")
    assert "a" not in pool
    back = dict(pool.get("a").serving.weights())
    assert all(torch.equal(back[name], learnt[name]) for name in learnt)


def test_without_a_folder_it_is_dropped_with_one_warning(draft, caplog):
    pool = DraftPool(lambda name, w: Member(draft, w), 1)
    moved(pool.get("a"), 1.0)
    with caplog.at_level(logging.WARNING, logger="hf_osd"):
        for name in "bca":
            pool.get(name)
    assert [record.getMessage().split()[1] for record in caplog.records] == ["'a'"]
    assert pool.get("a").serving.version == 0, "it begins anew"


def test_bytes_bound_what_is_in_memory(draft):
    pool = DraftPool(lambda name, w: Member(draft, w), 8)
    moved(pool.get("a"), 1.0)
    one = pool.nbytes
    assert one == sum(weight.nbytes for _, weight in pool.get("a").serving.weights())
    pool = DraftPool(lambda name, w: Member(draft, w), 8, max_bytes=2 * one)
    for name in "abcd":
        moved(pool.get(name), 1.0)
    pool.get("d")
    assert [name for name, _ in pool.items()] == ["c", "d"]


def test_what_has_not_learnt_adds_nothing_and_an_adapter_little(draft):
    assert route_bytes(Member(draft, None)) == 0
    adapter = Adapter(copy_draft(draft, frozen=set()), 2)
    member = Member(draft, None, adapter)
    assert route_bytes(member) == sum(weight.nbytes for weight in adapter.weights().values())


def test_adapters_rest_before_anything_goes(draft):
    base = copy_draft(draft, frozen=set())
    pool = DraftPool(lambda name, w: Member(base, w, Adapter(base, 2)), 8)
    for name in "ab":
        moved(pool.get(name), 0.5)
    a, b = (pool.peek(name).serving for name in "ab")
    merged, text = {name: p.clone() for name, p in a.active.named_parameters()}, torch.arange(8)[None]
    logits = [serving.active(text).logits for serving in (a, b)]
    held = a.lease()
    pool.max_bytes = pool.nbytes - 1
    pool.get("b")
    assert a.own_bytes() < b.own_bytes()
    assert all(torch.equal(p, merged[name]) for name, p in held.named_parameters()), "a call goes on with what it has"
    a.release(held)
    learnt = sum(weight.nbytes for _, weight in a.weights())
    leased = a.lease()
    assert a.own_bytes() == learnt, "it serves as it rests"
    torch.testing.assert_close(leased(text).logits, logits[0], rtol=1e-4, atol=1e-4)
    assert {p.data_ptr() for p in leased.parameters()} <= {
        p.data_ptr() for p in (*base.parameters(), *dict(a.weights()).values())
    }
    a.release(leased)
    assert not a.rest(), "it rests already"
    assert all(torch.equal(p, merged[name]) for name, p in a.plain().named_parameters())
    pool.max_bytes = learnt
    pool.get("b")
    assert list(dict(pool.items())) == ["b"]
    assert b.own_bytes() == learnt, "the one used last rests too where it does not fit"
    torch.testing.assert_close(b.active(text).logits, logits[1], rtol=1e-4, atol=1e-4)
    moved(pool.peek("b"), 0.5)
    assert b.own_bytes() > learnt, "merged at a refresh"
    assert not torch.allclose(b.active(text).logits, logits[1], atol=1e-4)


def test_names_are_told_apart_on_disk():
    names = ["sql", "SQL", "a/b", "a b", "../a", "", "ä" * 300]
    files = [file_name(name) for name in names]
    assert len(set(files)) == len(names)
    assert all("/" not in file and len(file) < 80 for file in files)


@pytest.mark.parametrize("max_bytes", [0, -5, True, 1.5])
def test_a_budget_of_nothing_is_refused(draft, max_bytes):
    with pytest.raises(ValueError, match="pool_bytes"):
        DraftPool(lambda name, w: Member(draft, w), 1, max_bytes)


def test_what_is_dropped_is_closed_once(draft):
    gone = []
    pool = DraftPool(lambda name, w: Member(draft, w), 4, closing=lambda name, *_: gone.append(name))
    pool.get("a")
    pool.drop("a")
    pool.drop("a")
    assert gone == ["a"]
    assert "a" not in pool
