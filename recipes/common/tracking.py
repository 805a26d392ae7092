"""`Tracking`: a run's figures for trackers such as trackio, through transformers' own integrations."""

from __future__ import annotations

import logging
import os
from pathlib import Path

logger = logging.getLogger("hf_osd.recipes.tracking")


class Tracking:
    """Transformers' own reporting integrations (trackio, tensorboard, wandb, …), fed with the run's figures. One that fails while requests are served
    is left out from then on, with a warning.

    Args:
        report_to (`str`): as in `TrainingArguments`, or `"none"`.
        output_dir: what the integrations take for the run's folder, and name it after.
        model: the draft, whose config they note.

    Raises:
        ValueError: if there is no such integration, or it cannot begin: not installed, not logged in.
    """

    def __init__(self, report_to: str, output_dir: str | os.PathLike, model):
        self._callbacks = []
        if report_to == "none":
            return
        from accelerate.state import is_initialized
        from transformers import TrainerControl, TrainerState, TrainingArguments, integrations

        name = Path(output_dir).resolve().name
        # They reset accelerate's state unless told not to, and a trainer that was made before them fails from then on.
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
                f"`report_to` is {report_to!r}, which cannot begin: {error} Mend that, or leave it out."
            ) from error

    def log(self, served: int, figures: dict[str, float | None]):
        """Figures at a number of requests served, the integrations' global step; those that are known."""
        if self._callbacks:
            self._event[1].global_step = served
            self._tell("on_log", logs={name: value for name, value in figures.items() if value is not None})

    def end(self):
        self._tell("on_train_end")

    def _tell(self, what: str, **kwargs):
        for callback in list(self._callbacks):
            try:
                getattr(callback, what)(*self._event, model=self._model, **kwargs)
            except Exception as error:
                self._callbacks.remove(callback)
                logger.warning("%s is told no more: %r.", type(callback).__name__, error)
