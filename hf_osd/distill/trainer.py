"""`OnlineGKDTrainer`: trl's GKD trainer over recorded feedback. The teacher's distributions were kept when it verified, so the
teacher never runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_osd.config import OnlineConfig
from hf_osd.distill.accelerate_state import STATE, detached, has_state_for, set_launch_settings_aside
from hf_osd.distill.collator import FeedbackCollator
from hf_osd.distill.feature_collator import FeatureCollator
from hf_osd.distill.loss_head import LossHead, loss_columns, sampled_tail
from hf_osd.distill.losses import divergence, draft_buckets, target_buckets
from hf_osd.distill.micro_batches import micro_batches
from hf_osd.distill.ranks import RankGroup
from hf_osd.distill.scoring import answer_logits, learners_autocast
from hf_osd.distill.unrolled import Unrolled, state_distances, unrolled_logits, unrolled_losses
from hf_osd.feedback.buffer import FeedbackBuffer
from hf_osd.feedback.feedback import Feedback, SparseLogits
from hf_osd.models.properties import reads_states

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from accelerate import Accelerator
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, get_scheduler
from trl.experimental.gkd import GKDConfig, GKDTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class OnlineGKDTrainer(GKDTrainer):
    """Distils recorded targets into a draft.

    `train()` passes over what the buffer holds; `learn(requests)` over the requests given. One trainer serves all updates: the
    optimizer's state and the learning rate's warm-up carry over from call to call.

    In a job of several processes each passes over its own requests, and all take as many steps: where one has no more batches, it takes part with
    one that teaches nothing. The gradients are those of one process on all their batches.

    A step over more than 2,048 tokens is made of several forward and backward passes, whose gradients add up to those of one (see
    [`hf_osd.distill.micro_batches`]); sampled columns are drawn for each. Not with FSDP and DeepSpeed.

    Args:
        model (`PreTrainedModel`): the draft to train. trl patches its `forward`: make serving copies first.
        buffer (`FeedbackBuffer`): where `train()` takes its requests from.
        config (`OnlineConfig`, *optional*): divergence, positions, batch size, optimizer; its other fields do not matter here.
        learning_rate (`float`, *optional*): in place of the config's.
        args (`GKDConfig`, *optional*): replaces `config` for the optimizer; see `training_args`.
        autocast_dtype (`torch.dtype`, *optional*): run forward passes under autocast in it.
        callbacks (`list[TrainerCallback]`, *optional*): such as [`RefreshAssistantCallback`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        buffer: FeedbackBuffer,
        config: OnlineConfig | None = None,
        args: GKDConfig | None = None,
        learning_rate: float | None = None,
        autocast_dtype: torch.dtype | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.config = config or OnlineConfig()
        self.buffer = buffer
        self._reads_states = reads_states(model)
        self._requests: Sequence[Feedback] | None = None
        self._losses: list[tuple[Tensor, int]] = []  # of the steps of `learn`: sum, and over how many rows
        self._autocast_dtype = autocast_dtype
        self._has_own_args = args is not None
        self.failure: Exception | None = None  # of a step of `learn` on this rank, which the others went on with
        with STATE:
            super().__init__(
                model=_without_wrapper(model),
                teacher_model=_NoTeacher(model.config),
                args=args
                or training_args(
                    self.config, model.device, **({} if learning_rate is None else {"learning_rate": learning_rate})
                ),
                data_collator=FeatureCollator(
                    model.config.states_size,
                    self.config.positions,
                    last_state=model.config.last_state if self.config.state_loss_weight else None,
                )
                if self._reads_states
                else FeedbackCollator(self.config.positions),
                # Both are demanded and never used: requests come from the buffer, as token ids.
                train_dataset=Dataset.from_dict({"labels": [[0]]}),
                processing_class=_no_tokenizer(),
                callbacks=callbacks,
            )
        self.processing_class = None  # train() would write its special tokens into the draft's config
        self.remove_callback(PrinterCallback)  # a library does not print
        self.model_accepts_loss_kwargs = (
            True  # whatever the draft's forward takes: the rows are counted for compute_loss, over all ranks
        )
        self._ranks = RankGroup.of_job()
        self.draws = torch.Generator("cpu")  # of batches and sampled columns
        seed = self.config.seed if self.config.seed is not None else torch.seed() % 2**62
        self.draws.manual_seed(seed + self._ranks.rank)
        if not self.is_deepspeed_enabled:
            self.accelerator.free_memory = self._drop_prepared
            self.accelerator.prepare_optimizer = self._prepare_optimizer

    def create_accelerator_and_postprocess(self):
        """Make the accelerator as upstream does, and set a launch config's settings aside."""
        super().create_accelerator_and_postprocess()
        self.accelerator.state = detached(self.accelerator.state)
        self.args.distributed_state = detached(self.args.distributed_state)
        if not self._has_own_args:
            set_launch_settings_aside(self.accelerator)

    def learn(self, requests: Sequence[Feedback]) -> float:
        """Pass once over `requests`, and return the mean loss a row."""
        self._requests, self._losses, self.failure = requests, [], None
        try:
            with warnings.catch_warnings():
                # Of torch, about what accelerate has no other name for yet.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                return self.train().training_loss
        finally:
            self._requests = None

    @property
    def losses(self) -> tuple[float, int]:
        """The loss of `learn` on this rank so far: its sum, and the number of rows."""
        return float(sum(total for total, _ in self._losses)), sum(rows for _, rows in self._losses)

    def get_train_dataloader(self) -> DataLoader:
        """Make batches of requests of like length, in random order; as many on each rank.

        Raises:
            ValueError: if there is nothing to learn from, on any rank.
        """
        requests = self._requests if self._requests is not None else self.buffer.sample(len(self.buffer), self.draws)
        requests = [one for one in requests if one.num_teaching(self.config.positions, self._reads_states)]
        size = self.config.batch_size or max(len(requests), 1)
        steps = self._ranks.most(-(-len(requests) // size))
        if not steps:
            raise ValueError("There is no feedback to learn from: serve requests with the assistant first.")
        by_length = sorted(requests, key=lambda request: request.tokens.shape[0])
        batches = [by_length[i : i + size] for i in range(0, len(by_length), size)]
        order = torch.randperm(len(batches), generator=self.draws, device="cpu").tolist()
        batches += [[self._nothing()]] * (steps - len(batches))
        order += range(len(order), steps)
        # With draws of its own: it would take its seed from the process's.
        return DataLoader(
            [batches[i] for i in order], batch_size=None, collate_fn=self._collated, generator=self.draws
        )

    def _collated(self, requests: list[Feedback]) -> dict:
        """Collate the requests of a step; those that would take too much memory beside the first ones apart, as further batches, `rest`. `labels` are those of all."""
        is_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # where ranks must run as many forwards
        first, *rest = map(self.data_collator, [requests] if is_sharded else micro_batches(requests))
        if not rest:
            return first
        labels = [batch["labels"].flatten() for batch in (first, *rest)]
        return {**first, "labels": torch.cat([labels[0].new_full((1,), -100), *labels]), "rest": rest}

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Make a step as Trainer does, one part of it after another. GKDTrainer would draw whether to let the student answer, from Python's random state, which may be a
        user's."""
        rest, loss = inputs.pop("rest", []), 0.0
        for i, batch in enumerate([inputs, *rest]):
            with contextlib.nullcontext() if i == len(rest) else self.accelerator.no_sync(model):
                loss = loss + super(GKDTrainer, self).training_step(model, batch, num_items_in_batch)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Compute the divergence between the recorded target and the draft, averaged over the rows of the whole optimizer step, on all ranks.

        Where it fails on one of several ranks, out of memory say, that one goes on without rows, for the others wait for its gradients; whoever
        called `learn` finds the error in `failure`. Not with FSDP and DeepSpeed.
        """
        try:
            return self._loss(model, inputs, return_outputs, num_items_in_batch)
        except Exception as error:
            if self._ranks.size == 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise  # where weights are sharded, a forward more than the others run would hang them
            self.failure = error
            traceback.clear_frames(error.__traceback__)  # which hold what memory there was
            nothing = self._prepare_inputs(self.data_collator([self._nothing()]))
            return self._loss(model, nothing, return_outputs, num_items_in_batch)

    def _loss(self, model: nn.Module, inputs: dict, return_outputs: bool, num_items_in_batch: Tensor | int | None):
        logits, at, unrolled = self._logits(model, inputs, whole=return_outputs)
        p = target_buckets(inputs["top_logps"], inputs["tail_logp"])
        if self._reads_states:
            draftable = None if (has := self._draftable(model)) is None else has[inputs["top_ids"]]
            distances = state_distances(unrolled, inputs) if "last_states" in inputs else None
            losses = unrolled_losses(logits, unrolled, at, p, self.config, draftable, distances)  # (R,)
        else:
            q = draft_buckets(logits, at)
            losses = divergence(p, q, self.config.divergence, self.config.beta, self.config.total_variation_weight)
        self._losses.append((losses.detach().sum(), len(losses)))
        loss = losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = (
                loss * self.accelerator.num_processes
            )  # the count is over all processes, and gradients are averaged over them
        return (loss, SimpleNamespace(logits=logits)) if return_outputs else loss

    def _nothing(self) -> Feedback:
        """Make a request without a row that teaches: its loss is 0, with gradients of 0 for all that trains."""
        tokens = torch.zeros(2, dtype=torch.int32, device="cpu")
        nothing = torch.full((1,), torch.nan, dtype=torch.float32, device="cpu")
        rows = SparseLogits(tokens[:1, None], nothing[:, None], nothing)
        source = tokens if self.model.config.is_encoder_decoder else None
        return replace(Feedback.from_target(tokens, 1, rows), source=source)

    def _logits(self, model: nn.Module, inputs: dict, whole: bool) -> tuple[Tensor, Tensor, Unrolled | None]:
        """Compute the draft's logits `(R, C)` for all V tokens, or for enough to estimate the loss; the columns `(R, k)` of `top_ids` in them; and of a feature-level draft
        which rows and steps these are, see [`unrolled_logits`]."""
        head = getattr(model, "module", model).get_output_embeddings()
        columns, samples = None, self.config.sampled_columns
        if samples is not None and not whole and isinstance(head, LossHead):
            columns = loss_columns(inputs["top_ids"], head.out_features, samples, self.draws, self._draftable(model))
        with learners_autocast(inputs["input_ids"].device.type, self._autocast_dtype):
            if columns is None:
                logits, unrolled = self._answer(model, inputs)
                return logits, inputs["top_ids"], unrolled
            chosen, at, support, size = columns
            with head.only(chosen):
                logits, unrolled = self._answer(model, inputs)
        return sampled_tail(logits.float(), support, size), at, unrolled

    def _draftable(self, model: nn.Module) -> Tensor | None:
        """The tokens that the draft's LM head has, bool `(V,)`; `None` if it has all of the target's."""
        return getattr(getattr(model, "module", model), "t2d", None) if self._reads_states else None

    def _answer(self, model: nn.Module, inputs: dict) -> tuple[Tensor, Unrolled | None]:
        """Compute the logits of the rows that teach, `(R, C)`; of a feature-level draft those of each row and step, and which these are, see [`unrolled_logits`]."""
        if self._reads_states:
            return unrolled_logits(model, inputs, self.config.unrolled_steps)
        return answer_logits(model, inputs), None

    def _drop_prepared(self, *objects) -> list:
        """Replace `Accelerator.free_memory`, with which every `train()` begins, without its cost to an update: a full garbage collection (a
        quarter of a second in a process that has imported trl) and an emptied device cache, which the next batch fills again."""
        for name in ("_schedulers", "_optimizers", "_models", "_dataloaders"):
            getattr(self.accelerator, name).clear()
        self.accelerator.step = 0
        return list(objects)

    def _prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None):
        """Wrap an optimizer as `Accelerator.prepare_optimizer` does, which reads accelerate's shared state, and leave it nothing of that."""
        with STATE:
            prepared = Accelerator.prepare_optimizer(self.accelerator, optimizer, device_placement)
        prepared.accelerator_state = self.accelerator.state
        return prepared

    def scale_rate(self, factor: float):
        """Multiply the learning rate; the optimizer's moments and the warm-up stay."""
        self.args.learning_rate *= factor
        for group in self.optimizer.param_groups if self.optimizer is not None else []:
            group["lr"] *= factor
            group["initial_lr"] = group.get("initial_lr", self.args.learning_rate) * factor
        if self.lr_scheduler is not None:
            self.lr_scheduler.base_lrs = [rate * factor for rate in self.lr_scheduler.base_lrs]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """Make the schedule once, where upstream would begin anew at every update: one warm-up, then a rate that is constant or falls with the root of the steps."""
        if self.lr_scheduler is None:
            decay = self.config.decay_steps
            self.lr_scheduler = get_scheduler(
                "constant_with_warmup" if decay is None else "inverse_sqrt",
                optimizer or self.optimizer,
                num_warmup_steps=self.config.warmup_steps,
                scheduler_specific_kwargs={} if decay is None else {"timescale": decay},
            )
        return self.lr_scheduler


class _NoTeacher(nn.Module):
    """Stands where GKDTrainer wants a teacher. Running it is a bug."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, *args, **kwargs):
        raise RuntimeError("The teacher ran. Its answers are recorded in the feedback; compute_loss must use those.")


def _without_wrapper(model: nn.Module) -> nn.Module:
    """The model itself where an adapter of a PeftModel lies on its LM head, which trl refuses, for its own losses read that head's weights; ours runs it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(model, "get_base_model") or not isinstance(model.get_output_embeddings(), BaseTunerLayer):
        return model
    inner = model.get_base_model()
    inner._hf_peft_config_loaded = (
        True  # as one with an adapter of transformers' own: Trainer asks that of a quantised one
    )
    return inner


def training_args(config: OnlineConfig, device: torch.device, **overrides) -> GKDConfig:
    """The `GKDConfig` that goes with an [`OnlineConfig`]: nothing saved, logged or evaluated; no mixed precision (the trainer does its
    own autocast); upstream's defaults would turn on bf16 and gradient checkpointing."""
    settings = {
        "output_dir": tempfile.gettempdir(),  # must exist; nothing is written
        "use_cpu": device.type == "cpu",
        "bf16": False,
        "activation_checkpointing": False,
        "gradient_checkpointing": False,  # the older name, on by default in trl
        "per_device_train_batch_size": config.batch_size or 1,
        "num_train_epochs": 1,
        # "auto" is found beside serving, from this one down.
        "learning_rate": 1e-3 if config.learning_rate == "auto" else config.learning_rate,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": config.seed if config.seed is not None else 42,
        "lmbda": 0.0,
        "router_aux_loss_coef": 0.0,  # the loss here has none; trl would ask layers for router logits that may have no router
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "ddp_broadcast_buffers": False,  # a draft has none that change; a rank whose step failed runs a forward more than the others
        "use_cache": True,  # Trainer writes it into the draft's config, with which the draft is saved and drafts
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "accelerator_config": {"use_configured_state": has_state_for(device)},
    }
    args = GKDConfig(**{**settings, **overrides})
    if args.n_gpu > 1:  # one process that sees several GPUs: Trainer would choose DataParallel, which trl refuses
        args._n_gpu = 1
    return args


def _no_tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>")
