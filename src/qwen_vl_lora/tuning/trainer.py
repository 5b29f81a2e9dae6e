"""transformers' Trainer on rows: one item of its data loader is one optimizer step.

The step's forward passes are planned here, not by gradient accumulation, so that rows are packed
by length and shared prompts stay together while the captions of a step are exactly the recipe's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.modeling.chat import EncodedConversation
from qwen_vl_lora.ranks import here
from qwen_vl_lora.tuning.checkpoints import INCOMING, prune, publish
from qwen_vl_lora.tuning.collator import ForwardPass, RowCollator, silenced
from qwen_vl_lora.tuning.interruption import Progress, SaveOnSignal
from qwen_vl_lora.tuning.rows import Row, StepSampler, pack_rows
from qwen_vl_lora.tuning.sharding import whole, whole_adapter

logger = logging.getLogger(__name__)

LOG_COLUMNS = ("step", "epoch", "loss", "validation_loss", "learning_rate", "grad_norm", "samples_per_second")
_OUR_NAMES = {"eval_loss": "validation_loss"}

_SECONDS_TO_SPEAK = 2.0

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
        self.loss_since_log: list[float] = []
        self._logged_at = (time.perf_counter(), 0)
        self.interruption = SaveOnSignal()
        super().__init__(
            model,
            args,
            train_dataset=train,  # type: ignore[arg-type]
            eval_dataset=validation,  # type: ignore[arg-type]
            callbacks=[EpochOrder(sampler), self.interruption, *(callbacks or [])],
        )
        self.progress = Progress(self)
        self.add_callback(self.progress)
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
        """The next step and its number of scored tokens over all ranks; every rank makes as many passes."""
        step = f"step {self.state.global_step + 1}"
        here.note(f"{step}: reading its captions")
        passes: list[ForwardPass] = next(epoch_iterator)
        samples = sum(len(forward.sample_ids) for forward in passes)
        scored = sum(len(forward.labels) for forward in passes)
        counts = here.gather([scored, samples, len(passes)], f"{step}: counting tokens")
        scored, captions = (int(sum(count)) for count in list(zip(*counts, strict=True))[:2])
        self._captions_seen += captions
        missing = int(max(count[2] for count in counts)) - len(passes)
        if missing:
            passes += [silenced(passes[0] if passes else self._collator([Row((self._train[0],))]))] * missing
        return [passes], torch.tensor(scored, device=device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Gradients of one optimizer step: the mean loss over its answer tokens."""
        model.train()
        total = torch.zeros((), device=self.args.device)
        step = f"step {self.state.global_step + 1}"
        for number, forward in enumerate(inputs):
            is_last = number == len(inputs) - 1
            here.note(f"{step}: pass {number + 1} of {len(inputs)}")
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                # Ranks average their gradients, so each one's sum is scaled up by their number.
                loss = self._summed_loss(model, forward) * self.accelerator.num_processes / num_items_in_batch
                with here.waiting(f"{step}: gradients") if is_last else contextlib.nullcontext():
                    self.accelerator.backward(loss)
            total += loss.detach()
        norm = self._gradient_norm(model)
        if not torch.isfinite(total + norm):
            self._stop_on_bad_step(float(total), float(norm), inputs)
        return total

    def _gradient_norm(self, model: Any) -> torch.Tensor:
        """Looked at before the step is taken: from a gradient that is no number the weights would never recover."""
        if self.accelerator.scaler is not None:  # on float16 the scaler skips such steps by itself
            return torch.zeros((), device=self.args.device)
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return whole(torch.nn.utils.get_total_norm(gradients))

    def _summed_loss(self, model: Any, forward: ForwardPass) -> torch.Tensor:
        with self.compute_loss_context_manager():
            logits = model(**self._prepare_inputs(forward.inputs), use_cache=False).logits
        rows, columns = forward.source.to(logits.device)
        return functional.cross_entropy(
            logits[rows, columns].float(), forward.labels.to(logits.device), reduction="sum"
        )

    def _stop_on_bad_step(self, loss: float, norm: float, inputs: Sequence[ForwardPass]) -> None:
        what = f"gradient's norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
        samples = [sample for forward in inputs for sample in forward.sample_ids]
        losses = [told[0] for told in here.gather([loss], "a bad step")]
        if math.isfinite(loss) and not all(map(math.isfinite, losses)):
            time.sleep(_SECONDS_TO_SPEAK)  # the rank whose samples did it is to be heard
        steps = [int(path.name.split("-")[1]) for path in Path(str(self.args.output_dir)).glob("checkpoint-*")]
        last = f"checkpoint-{max(steps)}" if steps else "none"
        raise TrainingError(
            f"The {what} at step {self.state.global_step + 1} on samples {', '.join(samples)}. "
            f"Last good checkpoint: {last} in {self.args.output_dir}. "
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
            batches = pack_rows(rows, size, size * longest)
            for number, forward in self._shared_batches(batches):
                here.note(f"validation batch {number + 1} of {len(batches)}")
                total += self._summed_loss(model, forward)
                tokens += len(forward.labels)
        sums = here.gather([float(total), tokens], "the validation loss")
        metrics = {f"{metric_key_prefix}_loss": sum(loss for loss, _ in sums) / sum(count for _, count in sums)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _shared_batches(self, batches: list[list[Row]]) -> Iterator[tuple[int, ForwardPass]]:
        """This rank's batches; the last round is filled up with silenced ones, so that all ranks make as many."""
        for start in range(0, len(batches), here.world_size()):
            number = start + here.rank()
            if number < len(batches):
                yield number, self._collator(batches[number])
            else:
                yield start, silenced(self._collator(batches[start]))

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a sharded model the adapter alone is put together; transformers would gather the base with it."""
        weights = whole_adapter(self.model)
        if weights is None:
            super().save_model(output_dir, _internal_call)
        else:
            self._save(output_dir, state_dict=weights)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write beside, and rename: a checkpoint is whole or absent, also after power loss."""
        root = Path(str(self.args.output_dir))
        incoming = root / INCOMING
        where = f"checkpoint {self.state.global_step}"
        self.loss_since_log = [told[0] for told in here.gather([float(self._tr_loss)], where)]
        if here.is_first():
            shutil.rmtree(incoming, ignore_errors=True)
        here.meet(where)
        self.args.output_dir = str(incoming)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(root)
        written = incoming / f"checkpoint-{self.state.global_step}"
        self._name_best_checkpoint(root, written)
        here.meet(where)
        if here.is_first():
            self.state.save_to_json(str(written / "trainer_state.json"))
            publish(written, root)
            prune(root, self.args.save_total_limit, self.state.best_model_checkpoint)
        here.meet(where)

    def _finalize_training(self, *arguments: Any) -> Any:
        """With a limit of 1 transformers would now remove the newest checkpoint; a kill could not go on from it."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*arguments)
        finally:
            self.args.save_total_limit = limit

    def _name_best_checkpoint(self, root: Path, written: Path) -> None:
        """The state must name the best checkpoint where it will lie, not where it is being written."""
        best = self.state.best_global_step
        folder = root / f"checkpoint-{best}"
        is_there = bool(best) and (folder.is_dir() or folder.name == written.name)
        self.state.best_model_checkpoint = str(folder) if is_there else None


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


class RowTeller(TrainerCallback):
    """Hands every row of `training_log` on as it is made."""

    def __init__(self, on_log: Callable[[dict[str, Any]], None]) -> None:
        self._on_log = on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for row in read_log(state.log_history[-1:]):
                self._on_log(row)


def tell_rows(trainer: CaptionTrainer, checkpoint: Path | None, on_log: Callable[[dict[str, Any]], None]) -> None:
    """Hand on the rows that a checkpoint brings, and from now on every new one."""
    if checkpoint is not None and trainer.is_world_process_zero():
        history = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).log_history
        for row in (row for entry in history for row in read_log([entry])):  # one by one, as they were told before
            on_log(row)
    trainer.add_callback(RowTeller(on_log))


def read_log(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's log history as rows of `training_log`, one for each step that was logged or validated."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        known = {_OUR_NAMES.get(name, name): value for name, value in entry.items()}
        known = {name: known[name] for name in LOG_COLUMNS if name in known}
        if "loss" in known or "validation_loss" in known:
            rows.setdefault(entry["step"], {}).update(known)
    return [rows[step] for step in sorted(rows)]
