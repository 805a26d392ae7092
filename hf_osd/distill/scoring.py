"""`score`: measures a draft's α on recorded feedback, teacher-forced. Learning is judged by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_osd.distill.collator import FeedbackCollator
from hf_osd.distill.feature_collator import FeatureCollator
from hf_osd.distill.unrolled import unrolled_logits
from hf_osd.feedback.feedback import Feedback
from hf_osd.models.heads import contiguous_head
from hf_osd.models.properties import forward_parameters, reads_states
from hf_osd.system.default_device import default_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_osd.config import OnlineConfig
    from hf_osd.models.hot_swap import HotSwapDraft


# Bytes of float32 logits that are made at once, unless one request has more.
_LOGITS = 64 * 2**20


def answer_logits(model: PreTrainedModel, batch: dict) -> Tensor:
    """The draft's logits at the teaching rows of a batch made by [`FeedbackCollator`] or, for a draft that reads the target's states, [`FeatureCollator`]: `(R, V)`.

    The LM head runs over the last `keep` columns alone where the model can do that.
    """
    base = getattr(model, "module", model)  # under DDP the forward must go through the wrapper, facts are the module's
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "features") if name in batch}
    if "decoder_input_ids" in batch:
        inputs["decoder_input_ids"] = batch["decoder_input_ids"]
    elif "position_ids" in forward_parameters(base):
        inputs["position_ids"] = batch["position_ids"]
    if base._supports_logits_to_keep():
        inputs["logits_to_keep"] = batch["keep"]
    logits = model(**inputs, use_cache=False).logits[:, -batch["keep"] :].flatten(0, 1)  # (B·keep, V)
    return logits if len(batch["rows"]) == len(logits) else logits[batch["rows"]]


class Judged(NamedTuple):
    """Holds a draft's scores on one request, teacher-forced: float32 `(N,)` each, NaN where a position has no target.

    `overlap` is its expected acceptance, see [`score`]; `confidence` the probability of its likeliest token; `shared` Σ min(p, q) over the stored top k at
    temperature 1, which shows smaller differences than whether a token is right.
    """

    overlap: Tensor
    confidence: Tensor
    shared: Tensor


def score(model: PreTrainedModel, feedback: Sequence[Feedback], batch_size: int = 8) -> list[Tensor]:
    """Expected acceptance of `model` at every position of each request: a float32 tensor `(N,)` each; α is their mean. NaN where a
    position has no target (see [`Feedback`]), or, for a draft that reads the target's states, no state to be predicted from: it is judged by the first token that it
    drafts after a verified one ([`score_by_step`] judges the others too).

    Greedy requests: 1 where the draft's argmax is the target's token, else 0; 0 as well where that token is several of the draft's. Of a draft with another
    tokenizer that is a lower bound: where its likeliest token is none of the target's, a call takes the next one. Sampled ones: Σ min(p, q) over the
    stored top k at temperature 1, a lower bound too, for dense rows are not stored.

    Args:
        model (`PreTrainedModel`): any draft over the feedback's vocabulary; no gradient, no cache.
        feedback (`Sequence[Feedback]`): the requests.
        batch_size (`int`): requests a forward, at most.
    """
    return [judged.overlap for judged in judge(model, feedback, batch_size, whole=False)]


def judge(
    model: PreTrainedModel, feedback: Sequence[Feedback], batch_size: int = 8, whole: bool = True
) -> list[Judged]:
    """Compute what [`score`] does, and, if `whole`, confidence and shared probability too; arguments as there. A greedy request's overlap takes the likeliest
    tokens alone, and passes once over the logits of a vocabulary, where the rest takes five; without `whole` the rest is NaN."""
    judged: list[Judged | None] = [None] * len(feedback)
    states = reads_states(model)
    with torch.inference_mode(False), torch.no_grad():
        for chosen, batch, logits in _answers(model, feedback, batch_size):
            argmax = logits.argmax(-1).cpu()  # (R,)
            measures = whole or any(feedback[i].sampled for i in chosen)
            if measures:
                logits = logits.float()
                total = logits.logsumexp(-1)
                sure = (logits.amax(-1) - total).exp().cpu()
                kept = (logits.gather(-1, batch["top_ids"]) - total[:, None]).exp().cpu()  # (R, k), under q
            for i, mask, rows in _parted(feedback, chosen, states):
                overlap, confidence, shared = (
                    torch.full((len(feedback[i]),), torch.nan, dtype=torch.float32, device="cpu") for _ in range(3)
                )
                if measures:
                    confidence[mask] = sure[rows]
                    shared[mask] = torch.minimum(kept[rows], feedback[i].top_logps[mask].float().exp()).sum(-1)
                if feedback[i].sampled:
                    overlap[mask] = shared[mask]
                else:
                    overlap[mask] = (argmax[rows] == feedback[i].answer[mask]).float()
                    if not states:  # a draft that reads these has the target's own tokens
                        overlap[_spelled(feedback[i])] = 0.0
                judged[i] = Judged(overlap, confidence, shared)
    return judged


def predictions(
    model: PreTrainedModel, feedback: Sequence[Feedback], batch_size: int = 8
) -> list[tuple[Tensor, Tensor]]:
    """Compute a draft's likeliest token at every position of each request and its probability, teacher-forced: int64 and float32 `(N,)`; -1 and NaN where [`score`] has NaN."""
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(feedback)
    with torch.inference_mode(False), torch.no_grad():
        for chosen, _, logits in _answers(model, feedback, batch_size):
            sure, ids = (x.cpu() for x in logits.float().softmax(-1).max(-1))
            for i, mask, rows in _parted(feedback, chosen, reads_states(model)):
                tokens = torch.full((len(feedback[i]),), -1, dtype=torch.long, device="cpu")
                confidence = torch.full((len(feedback[i]),), torch.nan, dtype=torch.float32, device="cpu")
                tokens[mask], confidence[mask] = ids[rows], sure[rows]
                found[i] = tokens, confidence
    return found


def _answers(
    model: PreTrainedModel, feedback: Sequence[Feedback], batch_size: int
) -> Iterator[tuple[list[int], dict, Tensor]]:
    """Yield the indices of some requests, their batch, and the draft's logits `(R, V)` at their teaching rows, until there were all."""
    order = sorted(range(len(feedback)), key=lambda i: feedback[i].tokens.shape[0])  # little padding
    collate, training = _collator(model), model.training
    model.eval()
    try:
        for chosen in _batches([feedback[i] for i in order], order, batch_size, model):
            with torch.inference_mode(False), torch.no_grad(), contiguous_head(model):
                batch = collate([feedback[i] for i in chosen])
                batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                logits = answer_logits(model, batch)
            yield chosen, batch, logits
    finally:
        model.train(training)


def _parted(feedback: Sequence[Feedback], chosen: Sequence[int], states: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield for each of the `chosen` requests its index, the mask `(N,)` of its teaching positions, and the rows of the logits that are theirs."""
    taught = [feedback[i].teaching_mask("all", states) for i in chosen]
    rows = torch.arange(sum(int(mask.sum()) for mask in taught), device="cpu")
    yield from zip(chosen, taught, rows.split([int(mask.sum()) for mask in taught]), strict=True)


def score_by_step(
    model: PreTrainedModel, feedback: Sequence[Feedback], steps: int, batch_size: int = 8
) -> list[Tensor]:
    """Expected acceptance of each token that `model` drafts in a row, if those before it were right: float32 `(steps, N)` for each request; the mean over
    [k] is the acceptance rate of the (k+1)-th token of a block.

    [k] at position i is of a block that begins at i-k. Greedy requests: 1 where the draft's likeliest token is the target's, else 0; sampled ones: Σ min(p, q), as in
    [`score`]. NaN where one of the k tokens before was another than the draft's likeliest one, the block would begin in the prompt, or a position has no target or
    no state. A draft that reads the target's states reads its own after the first token; any other predicts the same at each step, after the same text.

    Args:
        model (`PreTrainedModel`), feedback (`Sequence[Feedback]`), batch_size (`int`): as in [`score`].
        steps (`int`): tokens of a block.
    """
    scores: list[Tensor | None] = [None] * len(feedback)
    collate, training, states = _collator(model), model.training, reads_states(model)
    model.eval()
    with torch.inference_mode(False), torch.no_grad(), contiguous_head(model):
        for chosen in _batches(feedback, range(len(feedback)), max(batch_size // steps, 1), model):
            batch = collate([feedback[i] for i in chosen])
            batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            if states:
                logits, (rows, step, _) = unrolled_logits(model, batch, steps)
            else:
                logits = answer_logits(model, batch)
                rows = torch.arange(len(logits), device=logits.device)
                step = torch.zeros_like(rows)
            logits = logits.float()
            kept = (logits.gather(-1, batch["top_ids"][rows]) - logits.logsumexp(-1, keepdim=True)).exp()
            shared = torch.minimum(kept, batch["top_logps"][rows].exp()).sum(-1)
            taught = [feedback[i].teaching_mask("all", states) for i in chosen]
            answers = torch.cat([feedback[i].answer[mask] for i, mask in zip(chosen, taught, strict=True)])
            said = [logits.argmax(-1).cpu() == answers[rows.cpu()], shared.cpu()]  # (S,) each
            # (steps, R): whether the likeliest token was the target's, and the overlap; the same at each step of a draft that has one prediction.
            right, shared = (
                one.new_zeros(steps, len(answers)).index_put((step.cpu(), rows.cpu()), one) for one in said
            )
            known = torch.zeros_like(right).index_put((step.cpu(), rows.cpu()), torch.ones_like(said[0]))
            if not states:
                right, shared, known = (one[:1].expand(steps, -1) for one in (right, shared, known))
            sizes = [int(mask.sum()) for mask in taught]
            for i, mask, *parts in zip(
                chosen, taught, *(one.split(sizes, -1) for one in (right, shared, known)), strict=True
            ):
                scores[i] = _conditional(feedback[i], mask, *parts)
    model.train(training)
    return scores


def _conditional(feedback: Feedback, taught: Tensor, right: Tensor, shared: Tensor, known: Tensor) -> Tensor:
    """[`score_by_step`] of one request: `taught` `(N,)` has r positions, whose predictions are `(steps, r)` each."""
    steps, n = len(right), len(feedback)
    is_right = torch.zeros(steps, n, dtype=torch.bool, device="cpu")
    scores = torch.full((steps, n), torch.nan, dtype=torch.float32, device="cpu")
    is_right[:, taught] = right & known
    scores[:, taught] = torch.where(known, shared if feedback.sampled else right.float(), torch.nan)
    if feedback.states is None:
        spelled = _spelled(feedback)
        is_right[:, spelled] = False
        if not feedback.sampled:
            scores[:, spelled] = 0.0
    before = torch.ones(
        n, dtype=torch.bool, device="cpu"
    )  # whether all tokens of the block before a position were right
    for k in range(1, steps):
        before = torch.cat([before.new_zeros(min(n, 1)), (before & is_right[k - 1])[:-1]])
        scores[k, ~before] = torch.nan
    return scores


def _collator(model: PreTrainedModel) -> FeedbackCollator | FeatureCollator:
    """Of batches to judge by: all generated positions, and none of the prompts."""
    if reads_states(model):
        return FeatureCollator(model.config.states_size, prompts=False)
    return FeedbackCollator("all", prompts=False)


def judge_served(serving: HotSwapDraft, feedback: Sequence[Feedback]) -> list[Judged]:
    """[`judge`] the draft that serves, which is leased meanwhile; not under the caller's autocast."""
    with served(serving) as model:
        return judge(model, feedback)


@contextmanager
def served(serving: HotSwapDraft) -> Iterator[PreTrainedModel]:
    """Lease the draft that serves, to score it; not under the caller's autocast."""
    model = serving.lease()
    try:
        with learners_autocast(model.device.type, None):
            yield model
    finally:
        serving.release(model)


def _batches(
    feedback: Sequence[Feedback], at: Sequence[int], size: int, model: PreTrainedModel
) -> Iterator[list[int]]:
    """Split `at` into batches of up to `size`, of fewer where the logits of their requests would be too many."""
    vocabulary, batch, rows = getattr(model.get_output_embeddings(), "out_features", 0), [], 0
    for request, i in zip(feedback, at, strict=True):
        if batch and (len(batch) == size or (rows + len(request)) * vocabulary * 4 > _LOGITS):
            yield batch
            batch, rows = [], 0
        batch.append(i)
        rows += len(request)
    if batch:
        yield batch


def _spelled(feedback: Feedback) -> Tensor:
    """Mask `(N,)` the target's tokens that are several of the draft's: it can predict their first part, and they are not proposed (see [`VocabMapping`])."""
    taught = feedback.teaching_mask("all")
    return taught & torch.cat([~taught[1:], taught.new_zeros(min(len(taught), 1))])


@contextmanager
def learning_modes(device: torch.device) -> Iterator[None]:
    """Compute with gradients and in torch's own modes on `device`, whatever modes the caller is in."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        learners_autocast(device.type, None),
        torch.autocast("cpu", enabled=False),  # feedback lies there, wherever the draft does
        default_device("cpu"),  # and a Trainer's own tensors
    ):
        yield


def learners_autocast(device_type: str, dtype: torch.dtype | None) -> torch.autocast:
    """Make an autocast in `dtype`, or none, whatever the caller runs under. Casts are not cached: inside a user's autocast the cache would outlive
    the optimizer's steps, and the draft would be trained on weights it no longer has."""
    return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None, cache_enabled=False)


def learners_dtype(config: OnlineConfig, draft: PreTrainedModel) -> torch.dtype | None:
    """Choose bfloat16 if learning is to run under autocast, `None` for float32 throughout. "auto" takes what products of large matrices are faster in, by what the device
    is, not by the clock, so that a seeded run repeats."""
    if config.learner_dtype == "bfloat16":
        return torch.bfloat16
    if config.learner_dtype == "float32" or draft.dtype == torch.float32:
        return None
    if draft.device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif draft.device.type == "cpu":
        native = _cpu_is_faster_in_bfloat16(torch.cpu.get_capabilities())
    else:
        native = False
    return torch.bfloat16 if native else None


def _cpu_is_faster_in_bfloat16(capabilities: Mapping[str, object]) -> bool:
    """Tell whether products of large matrices take less time in bfloat16 than in float32, by `torch.cpu.get_capabilities()`. Emulated they take several times as long; and
    by AVX-512 alone, without AMX, an Intel processor computes about half as many a second as in float32 (docs/experiments.md). Other makers' were not measured."""
    if capabilities.get("amx_bf16"):
        return True
    return bool(capabilities.get("avx512_bf16")) and "intel" not in str(capabilities.get("cpu_name", "")).lower()
