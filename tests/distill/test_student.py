"""`Student`, and an ensemble of them: what serves of weights that train, and who judges what."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainerCallback
from transformers.training_args import OptimizerNames

from hf_osd.config import OnlineConfig
from hf_osd.distill import student as student_module
from hf_osd.distill.ensemble import make_student
from hf_osd.distill.scoring import judge, learners_dtype
from hf_osd.distill.student import Student
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.learning.learner import Learner

# One request a step, and no draws: a run can be repeated by hand, or resumed.
PLAIN = {"batch_size": 1, "warmup_steps": 0, "learning_rate": 1e-2, "replay_ratio": 0.0, "ema_decay": 0.0}
PLAIN |= {"sampled_columns": None, "gate": False, "seed": 0}


def trainable_of(draft) -> set[str]:
    return {name for name, _ in draft.named_parameters() if "layers" in name}


@pytest.fixture
def member(tiny_llama):
    def make(**fields) -> Student:
        draft = tiny_llama(layers=1)
        return make_student(draft, trainable_of(draft), OnlineConfig(**PLAIN | fields))

    return make


@pytest.fixture
def learner(tiny_llama):
    """`learner(**config) -> Learner`, whose refreshes are kept in `learner.refreshed`."""

    def make(**fields) -> Learner:
        draft, refreshed = tiny_llama(layers=1), []
        config = OnlineConfig(**PLAIN | fields)
        made = Learner(
            make_student(draft, trainable_of(draft), config), FeedbackBuffer(), lambda w: refreshed.append(cloned(w))
        )
        made.refreshed = refreshed
        return made

    return make


@pytest.fixture
def requests(make_feedback):
    return [make_feedback(n=6, prompt=4, seed=i) for i in range(12)]


@pytest.fixture
def taught(tiny_llama, answer_of):
    """What can be learnt: what another random model says."""
    target, random = tiny_llama(layers=2, seed=7), torch.Generator().manual_seed(0)
    return [answer_of(target, torch.randint(2, 64, (6,), generator=random), 12) for _ in range(4)]


def cloned(weights) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in weights.items()}


def same(one, other) -> bool:
    return set(one) == set(other) and all(torch.equal(p, other[name]) for name, p in one.items())


def students_of(learner) -> list[Student]:
    return getattr(learner.student, "students", [learner.student])


def close(one, other):
    for name, p in one.items():
        torch.testing.assert_close(p, other[name], atol=1e-6, rtol=1e-5, msg=name)  # float32, sums in another order


def learn(learner, requests) -> bool:
    for request in requests:
        learner.buffer.add(request)
    return learner.update()


class EachStep(TrainerCallback):
    """The weights after every optimizer step."""

    def __init__(self, member):
        self.member, self.weights = member, []
        member.trainer.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        self.weights.append(cloned(self.member.weights()))


# What of one member serves.


def averaged(steps, most):
    """By hand: the average after all steps, each counted from 1."""
    average = steps[0]
    for t, weights in enumerate(steps[1:], 2):
        decay = min(most, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * p for name, p in weights.items()}
    return average


@pytest.mark.parametrize("ema_decay", [0.4, 0.99])
def test_an_average_over_steps_serves(member, requests, ema_decay):
    """At 0.4 the decay is that of the warm-up in the first five steps, and 0.4 in the others; at 0.99 the warm-up's throughout."""
    one = member(ema_decay=ema_decay)
    steps = EachStep(one)
    for part in (requests[:5], requests[5:]):  # two updates are one run of steps
        one.learn(part)
    assert len(steps.weights) == one.steps == 12
    close(one.serving_weights(), averaged(steps.weights, ema_decay))
    assert same(one.weights(), steps.weights[-1]), "training goes on from the weights themselves"
    assert one.is_averaged


@pytest.mark.parametrize("optimism", [0.5, 2.0])
@pytest.mark.parametrize("ema_decay", [0.0, 0.4])
def test_what_serves_is_moved_on_by_the_last_step(member, requests, optimism, ema_decay):
    one = member(optimism=optimism, ema_decay=ema_decay)
    steps = EachStep(one)
    for part in (requests[:2], requests[2:5]):
        one.learn(part)
    *_, before, last = steps.weights
    base = averaged(steps.weights, ema_decay) if ema_decay else last
    close(one.serving_weights(), {name: base[name] + optimism * (p - before[name]) for name, p in last.items()})
    assert same(one.weights(), last)


def test_the_weights_serve_as_they_are_where_nothing_else_is_asked(member, requests):
    one = member()
    steps = EachStep(one)
    one.learn(requests[:2])
    assert not one.is_averaged
    assert same(one.serving_weights(), steps.weights[-1])


BOTH = {"ema_decay": 0.9, "optimism": 1.0}


@pytest.mark.parametrize("fields", [BOTH, {"ema_decay": 0.9}, {"optimism": 1.0}, {"ensemble": [1, 4], **BOTH}])
def test_judging_is_of_what_serves_and_leaves_what_trains(learner, tiny_llama, requests, monkeypatch, fields):
    made = learner(**fields)
    assert learn(made, requests[:4])
    masters = [cloned(member.weights()) for member in students_of(made)]
    served, master = tiny_llama(layers=1), judge(students_of(made)[0].module, requests)
    with torch.no_grad():
        for name, p in made.student.serving_weights().items():
            served.get_parameter(name).copy_(p)
    judging = made.student.score
    for now, expected in zip(judging(requests), judge(served, requests), strict=True):
        assert all(map(torch.equal, now, expected))
    assert any(not torch.equal(a.confidence, b.confidence) for a, b in zip(judging(requests), master, strict=True))
    given = {
        name: p.detach()
        for name, p in tiny_llama(layers=1, seed=1).named_parameters()
        if name in made.student.trainable
    }
    served.load_state_dict(given, strict=False)
    for now, expected in zip(judging(requests, given), judge(served, requests), strict=True):
        assert all(map(torch.equal, now, expected))
    assert all(same(member.weights(), kept) for member, kept in zip(students_of(made), masters, strict=True))

    def breaks(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(student_module, "judge", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        made.student.score(requests)
    assert all(same(member.weights(), kept) for member, kept in zip(students_of(made), masters, strict=True))


def test_going_back_is_being_as_before(member, requests):
    one = member(**BOTH)
    one.learn(requests[:3])
    snapshot, weights, served = one.snapshot(), cloned(one.weights()), cloned(one.serving_weights())
    one.learn(requests[3:6])
    assert not same(one.serving_weights(), served)
    one.restore(snapshot)
    assert one.steps == 3
    assert same(one.weights(), weights)
    assert same(one.serving_weights(), served)
    one.learn(requests[6:7])
    assert one.steps == 4
    assert one.trainer.lr_scheduler.last_epoch == 1, "and the optimizer is a new one"


@pytest.mark.parametrize("fields", [{}, BOTH])
def test_snapshots_share_weights_with_the_student_until_it_goes_on(member, requests, fields):
    one = member(**fields)
    begun = one.snapshot()
    for change in (lambda: one.learn(requests[:2]), lambda: one.set_weights(one.initial), lambda: one.restore(begun)):
        first = one.snapshot()
        weights = cloned(first.weights)
        assert one.snapshot().weights is first.weights
        one.score(requests[:1], one.initial)
        assert one.snapshot().weights is first.weights
        assert all(w.data_ptr() == first.weights[name].data_ptr() for name, w in one.weights().items())
        average = cloned(first.average or {})
        change()
        assert same(first.average or {}, average)
        assert one.snapshot().weights is not first.weights
        assert same(one.snapshot().weights, one.weights())
        assert same(first.weights, weights)


def test_what_is_restored_under_inference_mode_can_be_learnt_on(member, requests):
    """As after an update that failed in a user's own inference mode."""
    one = member(ema_decay=0.9)
    one.learn(requests[:2])
    with torch.inference_mode():
        one.restore(one.snapshot())
    one.learn(requests[2:4])
    assert one.steps == 4


def test_a_step_that_failed_is_none(member, requests, monkeypatch):
    """Its beginning must not be taken for that of a later step."""
    one = member(optimism=1.0)
    one.learn(requests[:1])
    snapshot, served = one.snapshot(), cloned(one.serving_weights())

    def breaks(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(one.trainer, "training_step", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        one.learn(requests[1:2])
    one.restore(snapshot)
    one.after_step()
    assert same(one.serving_weights(), served)


def test_other_weights_come_without_a_past(learner, requests):
    made = learner(ensemble=[1, 4], **BOTH)
    assert learn(made, requests[:4])
    weights = cloned(students_of(made)[0].weights())
    made.load_weights(weights)
    for member in students_of(made):
        assert not member.is_averaged
        assert member.steps == 0
        assert same(member.serving_weights(), weights)
    close(made.student.serving_weights(), weights)
    assert learn(made, requests[4:8])


# Several members.


def test_members_train_at_multiples_of_the_rate(learner, requests):
    """Plain descent: from one start, on one batch, the steps are as the rates."""
    made = learner(ensemble=[1, 4], batch_size=None)
    for member in students_of(made):
        member.trainer.args.optim, member.trainer.args.max_grad_norm = OptimizerNames.SGD, 0.0
    before = cloned(students_of(made)[0].weights())
    assert learn(made, requests[:2])
    one, four = ({name: p - before[name] for name, p in member.weights().items()} for member in students_of(made))
    assert any(step.abs().max() > 1e-4 for step in one.values())
    for name, step in one.items():
        torch.testing.assert_close(four[name], 4 * step, atol=1e-6, rtol=1e-3, msg=name)  # differences of float32


@given(losses=st.lists(st.floats(0, 1e4), min_size=1, max_size=5))
def test_shares_fall_exponentially_with_the_loss(tiny_llama, losses):
    draft = tiny_llama(layers=1)
    config = OnlineConfig(ensemble=[1.0] * len(losses))
    made = Learner(make_student(draft, trainable_of(draft), config), FeedbackBuffer(), print)
    made.student.losses = losses
    assert sum(made.student.shares) == pytest.approx(1.0)
    best = losses.index(min(losses))
    for share, loss in zip(made.student.shares, losses, strict=True):
        assert share == pytest.approx(made.student.shares[best] * math.exp(-10 * (loss - losses[best])))


def test_losses_are_of_new_requests_before_they_are_learnt(learner, taught, tiny_llama):
    """Of what a member would have served: an average, here."""
    made = learner(ensemble=[0.1, 1], replay_ratio=1.0, ema_decay=0.9)
    expected = [0.0, 0.0]
    for new in (taught, taught[:2], taught):
        for i, member in enumerate(students_of(made)):
            would = tiny_llama(layers=1)
            would.load_state_dict(member.serving_weights(), strict=False)
            overlap = torch.cat([judged.overlap for judged in judge(would, new)])
            expected[i] += 1 - overlap.mean().item()
        assert learn(made, new)
        assert made.student.losses == pytest.approx(expected)
    assert made.student.losses[0] != made.student.losses[1]


def test_the_mean_by_shares_serves(learner, taught):
    made = learner(ensemble=[0.1, 1, 2], ema_decay=0.9)
    for _ in range(2):
        assert learn(made, taught)
    shares, parts = made.student.shares, [member.serving_weights() for member in students_of(made)]
    assert len({round(share, 4) for share in shares}) > 1
    expected = {
        n: sum(share * part[n] for share, part in zip(shares, parts, strict=True)) for n in made.student.trainable
    }
    close(made.student.serving_weights(), expected)
    assert len(made.refreshed) == 2, "once an update, when all have learnt"
    close(made.refreshed[-1], expected)
    made.student.losses = [1e9, 0.0, 1e9]
    close(made.student.serving_weights(), parts[1])


def test_who_did_better_has_the_larger_share(learner, taught):
    made = learner(ensemble=[1e-4, 1])
    assert made.student.shares == [0.5, 0.5]
    for _ in range(8):  # the same requests over and over: one member learns them
        assert learn(made, taught)
    assert made.student.losses[1] < made.student.losses[0]
    assert made.student.shares[1] > 0.9


def test_what_fails_in_one_member_is_taken_back_in_all(learner, requests, monkeypatch):
    made = learner(ensemble=[1, 4], **BOTH)
    assert learn(made, requests[:3])
    weights, served = (
        [cloned(member.weights()) for member in students_of(made)],
        cloned(made.student.serving_weights()),
    )
    losses, steps = list(made.student.losses), [member.steps for member in students_of(made)]
    second = students_of(made)[1].learn

    def diverge(requests):
        second(requests)
        raise RuntimeError("diverged")

    with monkeypatch.context() as patch:
        patch.setattr(students_of(made)[1], "learn", diverge)
        patch.setattr(made.contenders, "serve", lambda: None)
        assert not learn(made, requests[3:6])
    assert (made.updates, made.failed) == (1, 1)
    assert all(same(member.weights(), kept) for member, kept in zip(students_of(made), weights, strict=True))
    assert same(made.student.serving_weights(), served)
    assert (made.student.losses, [member.steps for member in students_of(made)]) == (losses, steps)
    assert len(made.refreshed) == 1
    assert not learn(made, requests[9:])  # learning rests a turn
    assert learn(made, requests[6:9])
    assert not same(made.student.serving_weights(), served)


# Restarts.


def saved(learner):
    """Its state as it comes from the disk."""
    tensors, values = learner.state()
    return cloned(tensors), json.loads(json.dumps(values))


@pytest.mark.parametrize("fields", [{}, BOTH, {"ensemble": [1, 4], "warmup_steps": 6, "decay_steps": 3, **BOTH}])
def test_a_resumed_learner_goes_on_as_if_it_had_not_stopped(learner, requests, fields):
    fields = {"batch_size": None, **fields}  # batches come in an order that is drawn anew
    straight, resumed = learner(**fields), learner(**fields)
    for new in (requests[:2], requests[2:5]):
        assert learn(straight, new)
    straight.student.losses = [0.1 * i for i in range(len(students_of(straight)))]  # as if they had not done alike
    resumed.load_state(*saved(straight))
    assert saved(resumed)[1] == saved(straight)[1]
    assert same(resumed.student.serving_weights(), straight.student.serving_weights())
    for made in (straight, resumed):
        assert learn(made, requests[5:8])
    assert resumed.student.shares == straight.student.shares
    for one, other in zip(students_of(resumed), students_of(straight), strict=True):
        assert one.steps == other.steps
        assert one.trainer.lr_scheduler.get_last_lr() == other.trainer.lr_scheduler.get_last_lr()
        assert same(one.weights(), other.weights())
        assert same(one.serving_weights(), other.serving_weights())


def test_a_state_of_another_optimizer_is_refused_and_nothing_is_changed(learner, requests):
    made = learner()
    assert learn(made, requests[:2])
    tensors, values = saved(made)
    of_muon = {name.replace("exp_avg_sq", "momentum_buffer"): tensor for name, tensor in tensors.items()}
    other = learner()
    before = cloned(other.student.serving_weights())
    with pytest.raises(ValueError, match="not AdamW, for it has momentum_buffer"):
        other.load_state(of_muon, values)
    assert same(other.student.serving_weights(), before)


def test_a_state_of_another_number_of_members_is_refused(learner, requests):
    one, two, pair = learner(), learner(ensemble=[1, 4]), learner(ensemble=[1, 2])
    before = cloned(two.student.serving_weights())
    assert learn(one, requests[:2])
    with pytest.raises(ValueError, match="has 1 members and this one 2; resume with the `ensemble`"):
        two.load_state(*saved(one))
    assert same(two.student.serving_weights(), before)
    pair.load_state(*saved(two))  # other rates may be tried


def test_a_state_may_be_taken_up_where_another_was(learner, requests):
    """Moments and the rate's steps of what was learnt since are gone."""
    fields = {"batch_size": None, "warmup_steps": 8}
    straight, back = learner(**fields), learner(**fields)
    for made in (straight, back):
        assert learn(made, requests[:2])
    state = saved(back)
    assert learn(back, requests[2:4])
    back.load_state(*state)
    for made in (straight, back):
        assert learn(made, requests[4:6])
    assert same(back.student.serving_weights(), straight.student.serving_weights())


def test_an_average_that_is_no_longer_asked_for_does_not_serve_on(learner, requests):
    """Nothing would move it: what is learnt from then on would never serve."""
    before, plain = learner(**BOTH), learner()
    assert learn(before, requests[:4])
    plain.load_state(*saved(before))
    assert learn(plain, requests[4:6])
    assert same(plain.student.serving_weights(), plain.student.weights())


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, None),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC 9654"}, torch.bfloat16),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "cpu_name": "Intel Xeon"}, None),
        ({}, None),
    ],
)
def test_auto_learns_in_what_the_processor_is_fast_in(tiny_llama, monkeypatch, capabilities, expected):
    """By what it is and not by the clock; a draft that serves in float32 learns so, and what is asked for is done."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    draft = tiny_llama(layers=1).to(torch.bfloat16)
    assert learners_dtype(OnlineConfig(), draft) == expected
    assert learners_dtype(OnlineConfig(), draft.float()) is None
    draft.to(torch.bfloat16)
    assert learners_dtype(OnlineConfig(learner_dtype="bfloat16"), draft) == torch.bfloat16
    assert learners_dtype(OnlineConfig(learner_dtype="float32"), draft) is None
