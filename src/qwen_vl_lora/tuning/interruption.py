"""Stopping a training and going on exactly there: what a checkpoint holds beyond transformers' own, and signals."""

from __future__ import annotations

import logging
import resource
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from qwen_vl_lora.lineage.run import RunInterruptedError
from qwen_vl_lora.ranks import here

if TYPE_CHECKING:
    from qwen_vl_lora.tuning.trainer import CaptionTrainer

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Progress(TrainerCallback, ExportableState):
    """Carries over a kill what transformers' state forgets.

    That is the loss summed since the last log line, the callbacks' own counts (early stopping's patience), the time
    and memory spent so far, and whether training was at its end. An epoch's last checkpoint waits for the epoch's
    validation, so that no kill falls between the two.
    """

    def __init__(self, trainer: CaptionTrainer) -> None:
        self._trainer = trainer
        self._seconds_before = 0.0
        self._peak_before = 0
        self._began = time.perf_counter()
        self._save_waits = False

    @property
    def seconds(self) -> float:
        """Spent in training, all parts of an interrupted run together."""
        return self._seconds_before + time.perf_counter() - self._began

    @property
    def peak_bytes(self) -> int:
        """Most memory in use, of the GPU where there is one, in any part of the run."""
        on_gpu = self._trainer.args.device.type == "cuda"
        now = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return max(self._peak_before, now)

    def state(self) -> dict[str, Any]:
        loss = getattr(self._trainer, "_tr_loss", None)
        if loss is None:  # transformers asks before training, too
            return {"args": {}, "attributes": {}}
        callbacks = self._trainer.callback_handler.callbacks
        return {
            "args": {},
            "attributes": {
                "seconds": self.seconds,
                "peak_bytes": self.peak_bytes,
                "loss_since_log": self._trainer.loss_since_log,
                "logged_step": self._trainer._globalstep_last_logged,
                "at_end": self._trainer.control.should_training_stop,
                "callbacks": {
                    type(callback).__name__: callback.state()["attributes"]
                    for callback in callbacks
                    if isinstance(callback, ExportableState) and callback is not self
                },
            },
        }

    @staticmethod
    def stored_in(state: TrainerState) -> dict[str, Any]:
        """What a checkpoint's state says, or nothing where training starts afresh."""
        stored = state.stateful_callbacks
        own = stored.get("Progress", {}) if isinstance(stored, dict) else {}
        return dict(own.get("attributes", {}))

    def restore(self, state: TrainerState) -> None:
        """Take over time and memory of the parts before."""
        stored = self.stored_in(state)
        self._seconds_before = stored.get("seconds", 0.0)
        self._peak_before = stored.get("peak_bytes", 0)
        self._began = time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore(state)
        stored = self.stored_in(state)
        if not stored:
            return
        self._trainer._tr_loss.fill_(stored["loss_since_log"][here.rank()])
        self._trainer._globalstep_last_logged = stored["logged_step"]
        for callback in self._trainer.callback_handler.callbacks:
            for name, value in stored["callbacks"].get(type(callback).__name__, {}).items():
                setattr(callback, name, value)
        if state.best_global_step:  # the folder may have moved with the project
            best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        ends_epoch = float(state.epoch or 0).is_integer() or control.should_training_stop
        if control.should_save and ends_epoch and args.eval_strategy == IntervalStrategy.EPOCH:
            control.should_save, self._save_waits = False, True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._save_waits:
            control.should_save, self._save_waits = True, False


def train_on(trainer: CaptionTrainer, checkpoint: Path | None) -> None:
    """Train, from a checkpoint where there is one, watching for signals.

    A checkpoint of training's very end is only loaded: transformers would train one more step.

    Raises:
        RunInterruptedError: on SIGTERM or Ctrl-C, when a checkpoint is saved.
    """
    interruption = trainer.interruption
    with interruption:
        state = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if checkpoint is not None and state is not None and Progress.stored_in(state).get("at_end"):
            _load_end(trainer, checkpoint, state)
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            if interruption.agree("the end of training") and not _last_checkpoint(trainer).is_dir():
                trainer._save_checkpoint(trainer.model, None)
    interruption.stop_if_asked(trainer.args, trainer.state)  # no step was left that would have


def _last_checkpoint(trainer: CaptionTrainer) -> Path:
    return Path(str(trainer.args.output_dir)) / f"checkpoint-{trainer.state.global_step}"


def _load_end(trainer: CaptionTrainer, checkpoint: Path, state: TrainerState) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    if trainer.args.load_best_model_at_end and state.best_global_step:
        checkpoint = checkpoint.with_name(f"checkpoint-{state.best_global_step}")
    set_peft_model_state_dict(trainer.model, load_file(checkpoint / "adapter_model.safetensors"))
    trainer.state = state
    trainer.progress.restore(state)


class SaveOnSignal(TrainerCallback):
    """While entered, SIGTERM and Ctrl-C let the step end, save a checkpoint and stop; a second one stops at once."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._agreed: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agree(f"the end of step {state.global_step}"):
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.agree(f"checkpoint {state.global_step}")
        self.stop_if_asked(args, state)

    def agree(self, where: str) -> bool:
        """Whether any rank was asked to stop: all stop at the same place, wherever the signal came and when."""
        asked = int(max(told[0] for told in here.gather([self._received or 0], where)))
        self._agreed = signal.Signals(asked) if asked else None
        return asked != 0

    def stop_if_asked(self, args: TrainingArguments, state: TrainerState) -> None:
        """End the run where a signal asked for it; the step's checkpoint is saved.

        Raises:
            RunInterruptedError: saying how to go on.
        """
        if self._agreed is not None:
            raise RunInterruptedError(
                f"Stopped by {self._agreed.name} after step {state.global_step} of {state.max_steps}. Its checkpoint "
                f"is saved in {args.output_dir}; the same command goes on from there."
            )

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)
        self._give_back()
        logger.warning("%s: saving a checkpoint after this step. Once more stops at once.", self._received.name)

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
