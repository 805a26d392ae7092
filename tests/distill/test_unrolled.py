"""Training-time test: what each step of a feature-level draft learns, against a plain loop of drafting; and which states it reads for that."""

import copy
from dataclasses import replace

import pytest
import torch

from hf_osd import grow_feature_draft
from hf_osd.config import OnlineConfig
from hf_osd.distill.feature_collator import FeatureCollator
from hf_osd.distill.loss_head import LossHead
from hf_osd.distill.losses import divergence, draft_buckets, target_buckets
from hf_osd.distill.scoring import judge, score, score_by_step
from hf_osd.distill.trainer import OnlineGKDTrainer
from hf_osd.distill.unrolled import Unrolled, state_distances, unrolled_logits, unrolled_losses, unrolled_rows
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback
from hf_osd.feedback.target_states import TargetStates

VOCAB = 64
AUX = [1, 2, 3]


@pytest.fixture(scope="module")
def target(tiny_llama):
    return tiny_llama(layers=4)


@pytest.fixture(scope="module")
def draft(target):
    """A grown draft, moved a little: what it begins with is too regular to see a wrong column by."""
    draft = grow_feature_draft(target, AUX, seed=0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))
    return draft


def states_of(target, tokens: torch.Tensor, start: int, stop: int, aux=AUX) -> TargetStates:
    with torch.no_grad():
        hidden = target(input_ids=tokens[None].long(), output_hidden_states=True, use_cache=False).hidden_states
    return TargetStates.from_states(torch.cat([hidden[i][0] for i in aux], -1)[start:stop], len(aux), start)


@pytest.fixture(scope="module")
def answers(target, answer_of):
    """Four requests of the target, with states: of all positions, of all but the first ones, of the answer alone, of some of it."""
    random = torch.Generator().manual_seed(0)
    made = []
    for (prompt, n), (start, missing) in zip(
        [(5, 9), (9, 4), (3, 12), (7, 8)], [(0, 0), (4, 0), (1, 1), (7, 4)], strict=True
    ):
        one = answer_of(target, torch.randint(2, VOCAB, (prompt,), generator=random), n, k=VOCAB)
        made.append(replace(one, states=states_of(target, one.tokens, start, prompt + n - 1 - missing)))
    return made


def drafted(draft, request: Feedback, base: int, steps: int) -> list[torch.Tensor]:
    """Logits `(V,)` of each token that is drafted after the true tokens up to `base`, by a forward over all columns for each: all true states, then the draft's own
    for the tokens after."""
    dense, start, found = request.states.dense(), request.states.start, []
    own: list[torch.Tensor] = []
    with torch.no_grad():
        cache = None
        features = dense[: base - start][None]  # s_start … s_{base-1}, with the tokens after them
        ids = request.tokens[start + 1 : base + 1][None].long()
        places = torch.arange(start, base)[None]
        for k in range(steps):
            output = draft(
                input_ids=ids, position_ids=places, features=features, past_key_values=cache, use_cache=True
            )
            cache = output.past_key_values
            found.append(output.logits[0, -1])
            own.append(output.states[:, -1:])
            if base + k + 1 >= len(request.tokens):
                break
            ids = request.tokens[base + k + 1][None, None].long()
            places, features = torch.tensor([[base + k]]), own[-1]
    return found


def batch_of(draft, requests, **kwargs):
    return FeatureCollator(draft.config.states_size, **kwargs)(requests)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_each_step_is_what_is_drafted_after_so_many_tokens(draft, answers, steps):
    batch = batch_of(draft, answers)
    with torch.no_grad():
        logits, (rows, step, states) = unrolled_logits(draft, batch, steps)
    assert len(logits) == len(states) == len(rows) == sum(min(steps, int(depth) + 1) for depth in batch["depth"])
    tokens = []  # of each row: its request, and the token's place
    for request in answers:
        tokens += [
            (request, i)
            for i in range(request.prompt_length, len(request.tokens))
            if request.predicted_from_states()[i]
        ]
    assert len(tokens) == len(batch["rows"])
    for k, row, logit in zip(step.tolist(), rows.tolist(), logits, strict=True):
        request, token = tokens[row]
        expected = drafted(draft, request, token - 1 - k, k + 1)[k]
        torch.testing.assert_close(logit, expected, atol=2e-5, rtol=2e-5)


def config_of(**fields) -> OnlineConfig:
    return OnlineConfig(**{"warmup_steps": 0, "seed": 0, "sampled_columns": None, "learning_rate": 1e-2} | fields)


def trainer_of(draft, config) -> OnlineGKDTrainer:
    model = copy.deepcopy(draft)
    trainer = OnlineGKDTrainer(model, FeedbackBuffer(), config)
    trainer.args.max_grad_norm = 0.0
    return trainer


def plain_losses(draft, batch, config) -> torch.Tensor:
    """Of each row, as any draft learns: one step."""
    logits = draft(**{n: batch[n] for n in ("input_ids", "attention_mask", "position_ids", "features")}).logits
    q = draft_buckets(logits[:, -batch["keep"] :].flatten(0, 1)[batch["rows"]], batch["top_ids"])
    p = target_buckets(batch["top_logps"], batch["tail_logp"])
    return divergence(p, q, config.divergence, config.beta, config.total_variation_weight)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_with_one_step_the_loss_is_the_plain_one(draft, answers, divergence):
    config = config_of(unrolled_steps=1, divergence=divergence)
    trainer, batch = trainer_of(draft, config), batch_of(draft, answers)
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, plain_losses(draft, batch, config).mean())


def test_the_steps_add_up_with_falling_weights(draft, answers):
    """Each over the rows that have it, by those of the whole step: a row without a second step does not count for it."""
    config = config_of(unrolled_steps=3)
    trainer, batch = trainer_of(draft, config), batch_of(draft, answers)
    logits, unrolled = unrolled_logits(draft, batch, 3)
    rows, step, _ = unrolled
    p = target_buckets(batch["top_logps"], batch["tail_logp"])
    each = divergence(p[rows], draft_buckets(logits, batch["top_ids"][rows]), "forward_kl", 0.5, 1.0)
    expected = sum(0.8**k * each[step == k].sum() for k in range(3)) / 100
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(100))
    torch.testing.assert_close(loss, expected)
    assert trainer.losses[1] == len(p)
    losses = unrolled_losses(logits, unrolled, batch["top_ids"], p, config)
    assert losses.shape == p.shape[:1]


def test_sampled_columns_estimate_the_same_loss(tiny_llama, answer_of):
    """Some columns of the head stand for all of it, at each step, within what chance does."""
    target = tiny_llama(layers=4, vocab=512)
    draft = grow_feature_draft(target, AUX, seed=0)
    one = answer_of(target, torch.arange(2, 8), 6, k=4)
    one = replace(one, states=states_of(target, one.tokens, 0, 11))
    batch = batch_of(draft, [one])
    whole = trainer_of(draft, config_of())
    assert LossHead.install(draft) is not None
    sampling = trainer_of(draft, config_of(sampled_columns=150))
    widths = []
    sampling.model.lm_head.register_forward_hook(lambda head, inputs, output: widths.append(output.shape[-1]))
    found = torch.stack([sampling.compute_loss(sampling.model, batch).detach() for _ in range(20)])
    assert max(widths) < 200
    torch.testing.assert_close(found.mean(), whole.compute_loss(whole.model, batch).detach(), rtol=0.03, atol=0)


def test_states_alone_teach(draft, answers):
    """A request without states changes neither loss nor gradients, and no row reads a token or state that there is none for."""
    alone, beside = (trainer_of(draft, config_of(batch_size=None)) for _ in range(2))
    without = replace(answers[0], states=None)
    gradients = []
    for trainer, requests in ((alone, answers[:1]), (beside, [answers[0], without])):
        trainer.compute_loss(trainer.model, batch_of(draft, requests)).backward()
        gradients.append({n: p.grad for n, p in trainer.model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)
        assert gradient.isfinite().all()
    nothing = alone.compute_loss(alone.model, batch_of(draft, [without]), num_items_in_batch=torch.tensor(7))
    assert nothing.item() == 0


def test_requests_without_states_make_no_batch(draft, answers):
    trainer = trainer_of(draft, config_of(batch_size=1))
    without = [replace(one, states=None) for one in answers]
    trainer._requests = [answers[0], *without]
    assert len(trainer.get_train_dataloader()) == 1
    trainer._requests = without
    with pytest.raises(ValueError, match="no feedback"):
        trainer.get_train_dataloader()


def test_a_step_reads_no_true_state_of_the_tokens_it_drafts_itself(draft, answers):
    """Step k reads the target's states up to k tokens before, and of none later: these are not known when it drafts."""
    batch = batch_of(draft, answers[:1])
    batch["features"].requires_grad_()
    logits, (rows, step, _) = unrolled_logits(draft, batch, 3)
    for i, (row, k) in enumerate(zip(rows.tolist(), step.tolist(), strict=True)):
        (gradient,) = torch.autograd.grad(logits[i].square().sum(), batch["features"], retain_graph=True)
        read = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
        assert read == list(range(int(batch["depth"][row]) - k + 1)), (row, k)


def test_it_is_judged_by_its_first_step_and_where_there_are_states(draft, answers):
    requests = [*answers, replace(answers[0], states=None)]
    judged = judge(draft, requests)
    for one, said in zip(requests, judged, strict=True):
        known = one.teaching_mask("all", states=True)
        assert torch.equal(said.overlap.isnan(), ~known)
        assert torch.equal(said.confidence.isnan(), ~known)
        for i in known.nonzero().flatten().tolist():
            logits = drafted(draft, one, one.prompt_length + i - 1, 1)[0]
            assert said.overlap[i] == float(logits.argmax() == one.answer[i])
            assert said.confidence[i] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-4)
    assert judged[-1].overlap.isnan().all()
    assert int(judged[0].overlap.isnan().sum()) == 0
    assert [s.tolist() for s in score(draft, requests[:1])] == [judged[0].overlap.tolist()]


@pytest.mark.parametrize("sampled", [False, True])
def test_by_step_it_is_judged_where_the_tokens_before_were_right(draft, answers, sampled):
    requests = [replace(one, sampled=sampled) for one in answers]
    # One that is right in part, to have all cases: the target's tokens are in its rows, so it learns them.
    trainer = trainer_of(draft, config_of(batch_size=2, learning_rate=3e-3))
    for _ in range(25):
        trainer.learn(requests)
    learnt = trainer.model.eval()
    found = score_by_step(learnt, [*requests, replace(requests[0], states=None)], 3)
    assert found[-1].isnan().all()
    seen = set()
    for one, scores in zip(requests, found, strict=False):
        assert scores.shape == (3, len(one))
        known = one.teaching_mask("all", states=True).tolist()
        for i in range(len(one)):
            for k in range(3):
                begin = one.prompt_length + i - k  # the block's first token
                if k > i or not all(known[i - k : i + 1]):
                    assert scores[k, i].isnan()
                    continue
                logits = drafted(learnt, one, begin - 1, k + 1)
                right = [int(logits[j].argmax()) == int(one.tokens[begin + j]) for j in range(k + 1)]
                seen.add((k, *right))
                if not all(right[:k]):
                    assert scores[k, i].isnan()
                elif sampled:
                    q = logits[k].softmax(-1)[one.top_ids[i].long()]
                    expected = torch.minimum(q, one.top_logps[i].float().exp()).sum()
                    assert scores[k, i].item() == pytest.approx(expected.item(), abs=1e-4)
                else:
                    assert scores[k, i] == right[k]
    assert {(0, True), (0, False), (1, True, True), (1, True, False)} <= seen


def test_a_draft_of_tokens_is_judged_the_same_at_each_step(target, answers):
    found = score_by_step(target, answers, 3)
    assert all((one[0] == 1).all() for one in found)
    for one in found:
        for k in (1, 2):
            assert one[k, :k].isnan().all()
            assert (one[k, k:] == 1).all()


def test_a_state_is_drawn_to_the_targets_where_that_was_recorded(draft, answers):
    """In units of the target's size, so that the weight means the same for all targets; and by nothing where there is no state."""
    last = slice(0, 32)  # whichever part
    batch = batch_of(draft, answers, last_state=last)
    rows, step = unrolled_rows(batch["depth"], 3)
    aims = batch["last_states"][rows]
    for row, (state, known) in enumerate(zip(batch["last_states"], batch["has_last_state"], strict=True)):
        assert bool(known) == bool(state.any()), row
    assert batch["has_last_state"].any()
    assert not batch["has_last_state"].all()
    torch.testing.assert_close(state_distances(Unrolled(rows, step, aims), batch), torch.zeros(len(rows)))
    off = state_distances(Unrolled(rows, step, aims * 1.1), batch)
    assert (off[batch["has_last_state"][rows]] > 0).all()
    assert not off[~batch["has_last_state"][rows]].any()
    batch["last_states"] = batch["last_states"] * 100
    torch.testing.assert_close(state_distances(Unrolled(rows, step, aims * 110), batch), off, rtol=1e-4, atol=1e-6)


def test_the_weight_of_the_state_loss_counts(draft, answers):
    batch = batch_of(draft, answers, last_state=slice(0, 32))
    losses = [
        (t := trainer_of(draft, config_of(state_loss_weight=weight))).compute_loss(t.model, batch)
        for weight in (0.0, 1.0, 2.0)
    ]
    torch.testing.assert_close(losses[2] - losses[1], losses[1] - losses[0])
    assert losses[1] > losses[0]
