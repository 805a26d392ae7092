"""`Tracking`: a run's figures for trackers such as trackio, through transformers' own integrations."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("hf_osd.recipes.tracking")


class Tracking:
    """Passes the run's figures to transformers' own reporting integrations: trackio, tensorboard, wandb and others. An integration that fails while requests
    are served is dropped, with a warning.

    Args:
        report_to (`str`): as in `TrainingArguments`, or `"none"`.
        output_dir: the run's folder; its name is the run's name.
        model: the draft, whose config the integrations record.

    Raises:
        ValueError: if there is no such integration, or it cannot begin: not installed, or not logged in.
    """

    def __init__(self, report_to: str, output_dir: str | os.PathLike, model):
        self._callbacks = []
        if report_to == "none":
            return
        from accelerate.state import is_initialized
        from transformers import TrainerControl, TrainerState, TrainingArguments, integrations

        name = Path(output_dir).resolve().name
        # By default they reset accelerate's state, after which a trainer that was made before them fails.
        state = {"use_configured_state": is_initialized()}
        args = TrainingArguments(
            output_dir=str(output_dir), report_to=report_to, project="hf_osd", run_name=name, accelerator_config=state
        )
        self._event = (args, TrainerState(is_world_process_zero=True), TrainerControl())
        self._model = model
        try:
            self._callbacks = [kind() for kind in integrations.get_reporting_integration_callbacks(args.report_to)]
            for callback in self._callbacks:
                callback.on_train_begin(*self._event, model=model)
        except Exception as error:  # each has errors of its own
            raise ValueError(
                f"`report_to` is {report_to!r}, which cannot begin: {error} Correct that, or leave it out."
            ) from error

    def log(self, served: int, figures: dict[str, float | None]):
        """Pass on the figures that are known; the number of requests served is the integrations' global step."""
        if self._callbacks:
            self._event[1].global_step = served
            self._call("on_log", logs={name: value for name, value in figures.items() if value is not None})

    def end(self):
        """Tell the integrations that the run is over."""
        self._call("on_train_end")

    def _call(self, what: str, **kwargs):
        for callback in list(self._callbacks):
            try:
                getattr(callback, what)(*self._event, model=self._model, **kwargs)
            except Exception as error:
                self._callbacks.remove(callback)
                logger.warning("%s gets no more figures: %r.", type(callback).__name__, error)
