"""transformers' Trainer on rows: one item of its data loader is one optimizer step.

The step's forward passes are planned here, not by gradient accumulation, so that rows are packed
by length and shared prompts stay together while the captions of a step are exactly the recipe's.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.modeling.chat import EncodedConversation
from qwen_vl_lora.tuning.checkpoints import seal
from qwen_vl_lora.tuning.collator import ForwardPass, RowCollator
from qwen_vl_lora.tuning.rows import Row, StepSampler, pack_rows

logger = logging.getLogger(__name__)

LOG_COLUMNS = ("step", "epoch", "loss", "validation_loss", "learning_rate", "grad_norm", "samples_per_second")
_OUR_NAMES = {"eval_loss": "validation_loss"}

Plan = Callable[[Sequence[EncodedConversation]], list[list[Row]]]


class CaptionTrainer(Trainer):
    """Trains an adapter on encoded conversations.

    Args:
        model: a PeftModel.
        args: transformers' arguments, with one step for one item of the loader.
        train: the training conversations.
        validation: the validation conversations; may be empty.
        plan: cuts the conversations of a step into forward passes.
        collator: turns a pass into tensors.
        sampler: the conversations of each step.
    """

    control: TrainerControl

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        train: Sequence[EncodedConversation],
        validation: Sequence[EncodedConversation],
        plan: Plan,
        collator: RowCollator,
        sampler: StepSampler,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self._train = train
        self._validation = validation
        self._plan = plan
        self._collator = collator
        self._sampler = sampler
        self._captions_seen = 0
        self._logged_at = (time.perf_counter(), 0)
        super().__init__(
            model,
            args,
            train_dataset=train,  # type: ignore[arg-type]
            eval_dataset=validation,  # type: ignore[arg-type]
            callbacks=[EpochOrder(sampler), *(callbacks or [])],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(LossLines() if args.disable_tqdm else LossProgress())

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self._train,  # type: ignore[arg-type]
            batch_sampler=self._sampler,
            collate_fn=self._collate_step,
        )

    def _collate_step(self, conversations: list[EncodedConversation]) -> list[ForwardPass]:
        return [self._collator(rows) for rows in self._plan(conversations)]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The next step and its number of scored tokens over all ranks."""
        steps = [next(epoch_iterator)]
        scored = torch.tensor(sum(len(forward.labels) for forward in steps[0]), device=device)
        return steps, self.accelerator.gather(scored).sum()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of one optimizer step: the mean loss over its answer tokens."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        for number, forward in enumerate(inputs):
            is_last = number == len(inputs) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                # Ranks average their gradients, so each one's sum is scaled up by their number.
                loss = self._summed_loss(model, forward) * self.accelerator.num_processes / num_items_in_batch
                self.accelerator.backward(loss)
            total += loss.detach()
            self._captions_seen += len(forward.sample_ids)
        if not torch.isfinite(total):
            self._stop_on_bad_loss(float(total), inputs)
        return total

    def _summed_loss(self, model: Any, forward: ForwardPass) -> torch.Tensor:
        with self.compute_loss_context_manager():
            logits = model(**self._prepare_inputs(forward.inputs), use_cache=False).logits
        rows, columns = forward.source.to(logits.device)
        return functional.cross_entropy(
            logits[rows, columns].float(), forward.labels.to(logits.device), reduction="sum"
        )

    def _stop_on_bad_loss(self, loss: float, inputs: Sequence[ForwardPass]) -> None:
        samples = [sample for forward in inputs for sample in forward.sample_ids]
        checkpoints = sorted(path.name for path in Path(str(self.args.output_dir)).glob("checkpoint-*"))
        raise TrainingError(
            f"The loss became {loss} at step {self.state.global_step + 1} on samples {', '.join(samples)}. "
            f"Last good checkpoint: {checkpoints[-1] if checkpoints else 'none'} in {self.args.output_dir}. "
            "Lower training_args.learning_rate, or set max_grad_norm; on float16 use bf16."
        )

    def evaluate(  # type: ignore[override]
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean loss over all answer tokens of the validation conversations."""
        model: Any = self.model
        model.eval()
        total, tokens = torch.zeros((), device=self.args.device), 0
        rows = [Row((conversation,)) for conversation in self._validation]
        size = self.args.per_device_eval_batch_size
        longest = max(row.length for row in rows)
        with torch.no_grad():
            for batch in pack_rows(rows, size, size * longest):
                forward = self._collator(batch)
                total += self._summed_loss(model, forward)
                tokens += len(forward.labels)
        metrics = {f"{metric_key_prefix}_loss": float(total) / tokens}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the throughput since the last training log."""
        if "loss" in logs:
            now, seen = time.perf_counter(), self._captions_seen
            then, before = self._logged_at
            logs["samples_per_second"] = (seen - before) / (now - then)
            self._logged_at = (now, seen)
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # Trainer would count padding and pictures as text

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write beside, seal, and rename: a checkpoint is whole or absent."""
        final_root = Path(str(self.args.output_dir))
        incoming = final_root / ".incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        self.args.output_dir = str(incoming)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(final_root)
        written = incoming / f"checkpoint-{self.state.global_step}"
        self._name_best_checkpoint(final_root, written)
        seal(written)
        shutil.rmtree(final_root / written.name, ignore_errors=True)
        written.replace(final_root / written.name)
        self._prune_checkpoints(final_root)

    def _name_best_checkpoint(self, root: Path, written: Path) -> None:
        """The state on disk must name the best checkpoint where it will lie, not where it is being written."""
        best = self.state.best_global_step
        folder = root / f"checkpoint-{best}"
        is_there = bool(best) and (folder.is_dir() or folder.name == written.name)
        self.state.best_model_checkpoint = str(folder) if is_there else None
        (written / "trainer_state.json").unlink()
        self.state.save_to_json(str(written / "trainer_state.json"))

    def _prune_checkpoints(self, root: Path) -> None:
        limit = self.args.save_total_limit
        found = sorted(root.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        kept = set(found[-limit:]) if limit else set(found)
        for path in found:
            if path not in kept and str(path) != self.state.best_model_checkpoint:
                shutil.rmtree(path, ignore_errors=True)


class EpochOrder(TrainerCallback):
    """Tells the sampler which epoch begins; Trainer tells only samplers of its own making."""

    def __init__(self, sampler: StepSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sampler.set_epoch(int(state.epoch or 0))


class LossProgress(ProgressCallback):
    """A progress bar that shows the loss, and leaves no lines behind."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}")


class LossLines(TrainerCallback):
    """The same for a log file."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            logger.info("Step %d of %d: loss %.4f", state.global_step, state.max_steps, logs["loss"])


def read_log(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's log history as rows of `training_log`, one for each step that was logged or validated."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        known = {_OUR_NAMES.get(name, name): value for name, value in entry.items()}
        known = {name: known[name] for name in LOG_COLUMNS if name in known}
        if "loss" in known or "validation_loss" in known:
            rows.setdefault(entry["step"], {}).update(known)
    return [rows[step] for step in sorted(rows)]
