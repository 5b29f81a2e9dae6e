"""The training loop: optimizer steps, log, validation, checkpoints and signals, from top to bottom.

Device, mixed precision and gradients over several processes are accelerate's, sharding is torch's `fully_shard`,
optimizer and schedule are transformers' own, so TrainingArguments' names keep their meaning. An optimizer step has
exactly the recipe's number of captions; `rows.plan_passes` divides them into forward passes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import set_seed

from qwen_vl_lora.cluster import here
from qwen_vl_lora.exceptions import TrainingError
from qwen_vl_lora.model.chat import EncodedConversation
from qwen_vl_lora.model.devices import choose_device
from qwen_vl_lora.model.families import family_of
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.training import sharding
from qwen_vl_lora.training.arguments import make_optimizer, make_schedule, training_arguments
from qwen_vl_lora.training.checkpoints import INCOMING, STATE_FILE, prune, publish
from qwen_vl_lora.training.collator import ForwardPass, RowCollator, silenced, to_device
from qwen_vl_lora.training.interruption import SaveOnSignal
from qwen_vl_lora.training.last_layer import LastLayer
from qwen_vl_lora.training.rows import Row, StepSampler, pack_rows, plan_passes, share_groups

logger = logging.getLogger(__name__)

Record = dict[str, Any]
OnRow = Callable[[Record], None]
"""Called with each new row of `training_log`. A step may come in two parts, its loss and its validation loss."""

LOG_COLUMNS = ("step", "epoch", "loss", "validation_loss", "learning_rate", "grad_norm", "samples_per_second")

_SECONDS_TO_SPEAK = 2.0
_MIXED_PRECISION = {"bfloat16": "bf16", "float16": "fp16", "float32": "no"}


@dataclass
class TrainingState:
    """The state of the loop besides weights, optimizer, schedule and random numbers. A checkpoint stores it as JSON.

    Attributes:
        step: optimizer steps taken.
        epoch: passes over the training set, as a fraction.
        log: logged values in order; a validation has an entry of its own.
        losses: loss of each rank, summed over the steps since the last log.
        logged_step: step of the last log of the training loss.
        best_step, best_loss: of the best validation, if the best step is published.
        worse_validations: consecutive validations without improvement, for early stopping.
        highest_rate: highest learning rate of a step.
        seconds: of training, all parts of an interrupted run together.
        peak_bytes: peak memory of the GPU, or of the process on a CPU, over all parts of the run.
        is_at_end: whether the training is complete.
    """

    step: int = 0
    epoch: float = 0.0
    log: list[Record] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    logged_step: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    worse_validations: int = 0
    highest_rate: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    is_at_end: bool = False

    def rows(self) -> list[Record]:
        """Rows of `training_log`, one for each step that was logged or validated."""
        rows: dict[int, Record] = {}
        for part in self.log:
            rows.setdefault(part["step"], {}).update(part)
        return [rows[step] for step in sorted(rows)]


class StepBatches:
    """The forward passes of each optimizer step and of a validation, on this rank.

    Args:
        train, validation: the conversations; `validation` may be empty.
        collator: turns rows into tensors.
        settings: `rows`, and the captions of an optimizer step.
        size: captions of one forward pass.
    """

    def __init__(
        self,
        train: Sequence[EncodedConversation],
        validation: Sequence[EncodedConversation],
        collator: RowCollator,
        settings: Parameters,
        size: int,
    ) -> None:
        self._train = train
        self._validation = [Row((conversation,)) for conversation in validation]
        self._collator = collator
        self._settings = settings
        self._size = size
        self._sampler = step_sampler(train, settings)

    def __len__(self) -> int:
        """Optimizer steps of one epoch."""
        return len(self._sampler)

    def epoch(self, epoch: int, first_step: int) -> Iterator[list[ForwardPass]]:
        """The passes of each step from `first_step` on. The call draws one number from torch's generator."""
        self._sampler.start_at(epoch, first_step)
        on_gpu = choose_device(self._settings.device).type == "cuda"
        steps: DataLoader[list[ForwardPass]] = DataLoader(
            self._train,  # type: ignore[arg-type]
            batch_sampler=self._sampler,
            collate_fn=self.collate,
            pin_memory=on_gpu,
        )
        return iter(steps)

    def collate(self, conversations: Sequence[EncodedConversation]) -> list[ForwardPass]:
        """The passes of one optimizer step."""
        return [self._collator(rows) for rows in plan_passes(conversations, self._settings.rows, self._size)]

    def silent(self) -> ForwardPass:
        """A pass without scored tokens, for a rank whose share of a step is empty."""
        return silenced(self._collator([Row((self._train[0],))]))

    def first(self) -> ForwardPass:
        """The first pass of the training, or one of a single caption if this rank's share is empty."""
        step = [self._train[index] for index in next(iter(step_sampler(self._train, self._settings)))]
        return self._collator(plan_passes(step or self._train[:1], self._settings.rows, self._size)[0])

    def validation(self) -> Iterator[tuple[str, ForwardPass]]:
        """This rank's batches of the validation set with their names. Silenced passes complete the last round."""
        size = self._settings.training_args.per_device_eval_batch_size
        batches = pack_rows(self._validation, size, size * max(row.length for row in self._validation))
        for start in range(0, len(batches), here.world_size()):
            number = start + here.rank()
            is_mine = number < len(batches)
            forward = self._collator(batches[number if is_mine else start])
            yield f"validation batch {number + 1} of {len(batches)}", forward if is_mine else silenced(forward)


def step_sampler(train: Sequence[EncodedConversation], settings: Parameters) -> StepSampler:
    """The sampler of this rank's conversations for each optimizer step."""
    arguments = settings.training_args
    step_size = arguments.captions_per_step * here.world_size()
    return StepSampler(share_groups(train, settings.rows), step_size, arguments.seed, here.rank(), here.world_size())


def count_steps(train: Sequence[EncodedConversation], settings: Parameters) -> int:
    """Optimizer steps of the whole training."""
    arguments = settings.training_args
    if arguments.max_steps > 0:
        return arguments.max_steps
    return math.ceil(arguments.num_train_epochs * len(step_sampler(train, settings)))


class TrainingLoop:
    """Trains the adapter of a model, and resumes from a checkpoint bit for bit.

    Args:
        model: a PeftModel.
        train, validation: the conversations; `validation` may be empty.
        collator: turns rows into tensors.
        settings: all settings of the run.
        size: captions of one forward pass.
        folder: of the checkpoints.
        on_row: called with every row of `training_log`, those of the checkpoint first.

    Attributes:
        steps: optimizer steps of the whole training.
        reached: names of the tensors that the first step gave a gradient other than zero.
    """

    def __init__(
        self,
        model: Any,
        train: Sequence[EncodedConversation],
        validation: Sequence[EncodedConversation],
        collator: RowCollator,
        settings: Parameters,
        size: int,
        folder: Path,
        on_row: OnRow | None = None,
    ) -> None:
        base = model.get_base_model()
        self._last_layer = LastLayer(base, family_of(base.config))
        self.batches = StepBatches(train, validation, collator, settings, size)
        self.steps, self.folder = count_steps(train, settings), folder
        self.state = TrainingState(losses=[0.0] * here.world_size())
        self._arguments = settings.training_args
        library = training_arguments(settings)
        self.device = library.device  # reading it also resets accelerate for another training in this process
        gradients = DistributedDataParallelKwargs(
            # A pass without pictures gives an adapted tower no gradients.
            find_unused_parameters=settings.vision == "adapted",
            broadcast_buffers=False,  # buffers never change
        )
        self._accelerator = Accelerator(
            mixed_precision=_MIXED_PRECISION[self._arguments.dtype],
            cpu=self.device.type == "cpu",
            kwargs_handlers=[gradients],
        )
        self.adapted = model
        self.reached: set[str] = set()
        self._library = library
        self._on_row = on_row
        self._signals = SaveOnSignal()
        self._shown: dict[str, str] = {}
        self._random_numbers: dict[str, torch.Tensor] | None = None

    def run(self, checkpoint: Path | None = None) -> TrainingState:
        """Train to the end, from a checkpoint if one is given. The model then has the weights to publish.

        Raises:
            RunInterruptedError: on SIGTERM or Ctrl-C, after saving a checkpoint.
            TrainingError: if a loss or gradient is not finite.
        """
        set_seed(self._arguments.seed)
        self.prepare(checkpoint)
        with self._signals:
            with self._progress_bar() as self._bar:
                while not self.state.is_at_end:
                    self._train_epoch()
            if self._signals.agree("the end of training") and not self._checkpoint(self.state.step).is_dir():
                self._save()
        self._signals.stop_if_asked(self.state.step, self.steps, self.folder)
        if self.state.best_step is not None:
            self._load_weights(self._checkpoint(self.state.best_step))
        self.state = replace(self.state, **self._spent())
        return self.state

    def prepare(self, checkpoint: Path | None = None) -> None:
        """Set up model, optimizer and schedule for the first step, or restore them from the checkpoint."""
        is_sharded = self._arguments.is_sharded
        self._began, self._logged_at, self._captions = time.perf_counter(), time.perf_counter(), 0
        if checkpoint is not None:
            self._load_weights(checkpoint)
        if is_sharded:
            sharding.shard(self.adapted)
        optimizer = make_optimizer(self.adapted, self._library)
        # A sharded model reduces its gradients itself, so it is not wrapped in DDP.
        self.model = self._accelerator.prepare_model(self.adapted, evaluation_mode=is_sharded)
        self.optimizer = self._accelerator.prepare_optimizer(optimizer)
        self.schedule = make_schedule(self.optimizer, self._library, self.steps)
        self._loss = torch.zeros((), device=self.device)
        if checkpoint is not None:
            self._load(checkpoint)

    def _train_epoch(self) -> None:
        """Train the remaining steps of the epoch."""
        state = self.state
        epoch, done = divmod(state.step, len(self.batches))
        if done == 0:  # a checkpoint between two epochs precedes the number that the next epoch draws
            self._restore_random_numbers()
        steps = self.batches.epoch(epoch, done)
        self._restore_random_numbers()
        here.note(f"step {state.step + 1}: reading its captions")
        for number, passes in enumerate(steps, start=done + 1):
            self._take_step(passes)
            state.step += 1
            self._bar.update()
            state.epoch = epoch + number / len(self.batches)
            state.is_at_end = state.step >= self.steps
            asked = self._signals.agree(f"the end of step {state.step}")
            self._log_where_due()
            if self._is_due(self._arguments.eval_strategy, self._arguments.eval_steps):
                self._validate()
                self._log_where_due()  # early stopping may have ended the training
            if asked or self._is_due(self._arguments.save_strategy, self._arguments.save_steps):
                self._save()
                self._signals.agree(f"checkpoint {state.step}")
                self._signals.stop_if_asked(state.step, self.steps, self.folder)
            if state.is_at_end:
                break
            here.note(f"step {state.step + 1}: reading its captions")

    def _is_due(self, strategy: str, interval: int | None) -> bool:
        """Whether an action with this strategy and interval is due after this step."""
        state = self.state
        if strategy == "steps":
            return state.is_at_end or state.step % (interval or 1) == 0
        return strategy == "epoch" and (state.is_at_end or state.step % len(self.batches) == 0)

    # One step

    def _take_step(self, passes: list[ForwardPass]) -> None:
        """Compute and clip the gradients of the step's mean loss over its answer tokens, then update the weights."""
        passes, scored = self._share(passes)
        loss = self.compute_gradients(passes, scored)
        if not self.reached:  # in the first step only: it costs time
            gradients = ((name, weight.grad) for name, weight in self.adapted.named_parameters())
            self.reached = {name for name, given in gradients if given is not None and sharding.whole(given).any()}
        # Without a limit this only computes the norm.
        limit = self._arguments.max_grad_norm or math.inf
        norm = sharding.whole(self._accelerator.clip_grad_norm_(self.adapted.parameters(), limit))
        # On float16 the scaler skips a step whose gradient is not finite.
        if not torch.isfinite(loss) or (self._accelerator.scaler is None and not torch.isfinite(norm)):
            self._stop_on_bad_step(float(loss), float(norm), passes)
        self._loss += loss
        rate = float(self.optimizer.param_groups[0]["lr"])
        self.state.highest_rate = max(self.state.highest_rate, rate)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped and self._arguments.lr_scheduler_type != "reduce_lr_on_plateau":
            self.schedule.step()
        self.model.zero_grad()
        self._last = {"learning_rate": rate, "grad_norm": float(norm)}

    def _share(self, passes: list[ForwardPass]) -> tuple[list[ForwardPass], int]:
        """The passes, padded to the same number on every rank, and the scored tokens of all ranks."""
        samples = sum(len(forward.sample_ids) for forward in passes)
        scored = sum(len(forward.labels) for forward in passes)
        counts = here.gather([scored, samples, len(passes)], f"step {self.state.step + 1}: counting tokens")
        self._captions += int(sum(count[1] for count in counts))
        missing = int(max(count[2] for count in counts)) - len(passes)
        if missing:
            passes = passes + [silenced(passes[0]) if passes else self.batches.silent()] * missing
        return passes, int(sum(count[0] for count in counts))

    def compute_gradients(self, passes: Sequence[ForwardPass], scored: int) -> torch.Tensor:
        """Forward and backward passes of one optimizer step. Returns this rank's loss times the number of ranks."""
        self.model.train()
        total, step = torch.zeros((), device=self.device), f"step {self.state.step + 1}"
        count = torch.tensor(scored, device=self.device)
        for number, forward in enumerate(passes, start=1):
            is_last = number == len(passes)
            here.note(f"{step}: pass {number} of {len(passes)}")
            with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self.model):
                # Ranks average their gradients, so each rank's sum is multiplied by their number.
                loss = self.summed_loss(forward) * here.world_size() / count
                with here.waiting(f"{step}: gradients") if is_last else contextlib.nullcontext():
                    self._accelerator.backward(loss)
            total += loss.detach()
        return total

    def summed_loss(self, forward: ForwardPass) -> torch.Tensor:
        """Cross entropy over the scored tokens of one pass."""
        inputs, source, labels = to_device((forward.inputs, forward.source, forward.labels), self.device)
        logits = self._last_layer.scored_logits(self.model, inputs, source)
        return functional.cross_entropy(logits.float(), labels, reduction="sum")

    def _stop_on_bad_step(self, loss: float, norm: float, passes: Sequence[ForwardPass]) -> None:
        what = f"gradient's norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
        samples = [sample for forward in passes for sample in forward.sample_ids]
        losses = [told[0] for told in here.gather([loss], "a bad step")]
        if math.isfinite(loss) and not all(map(math.isfinite, losses)):
            time.sleep(_SECONDS_TO_SPEAK)  # lets the rank with the bad samples report first
        steps = [int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*")]
        last = f"checkpoint-{max(steps)}" if steps else "none"
        raise TrainingError(
            f"The {what} at step {self.state.step + 1} on samples {', '.join(samples)}. "
            f"Last good checkpoint: {last} in {self.folder}. "
            "Lower training_args.learning_rate, or set max_grad_norm; on float16 use bf16."
        )

    # Log and validation

    def _log_where_due(self) -> None:
        arguments, state = self._arguments, self.state
        is_first = state.step == 1 and arguments.logging_first_step
        by_steps = arguments.logging_strategy != "epoch" and state.step % arguments.logging_steps == 0
        by_epoch = arguments.logging_strategy == "epoch" and self._is_due("epoch", None)
        if state.step == state.logged_step or not (is_first or by_steps or by_epoch):
            return
        losses = [told[0] for told in here.gather([float(self._loss)], f"step {state.step}: logging")]
        loss = sum(losses) / len(losses) / (state.step - state.logged_step)
        now = time.perf_counter()
        speed = self._captions / (now - self._logged_at)
        self._logged_at, self._captions, state.logged_step = now, 0, state.step
        self._loss.zero_()
        self._log({"loss": loss, **self._last, "samples_per_second": speed})
        if here.is_first():
            self._show("loss", loss)

    def _show(self, name: str, loss: float) -> None:
        """Show a loss beside the progress bar, or in a line where there is no terminal."""
        self._shown[name] = f"{loss:.4f}"
        self._bar.set_postfix(self._shown)
        if self._bar.disable:
            logger.info("Step %d of %d: %s %.4f", self.state.step, self.steps, name, loss)

    def _log(self, values: Record) -> None:
        row = {"step": self.state.step, "epoch": self.state.epoch, **values}
        self.state.log.append(row)
        self._hand_on([row])

    def _hand_on(self, rows: Sequence[Record]) -> None:
        if self._on_row is not None and here.is_first():
            for row in rows:
                self._on_row(row)

    def _validate(self) -> None:
        """Log the validation loss, and update the best step and early stopping."""
        arguments, state, loss = self._arguments, self.state, self.validation_loss()
        self._log({"validation_loss": loss})
        if here.is_first():
            self._show("validation loss", loss)
        if arguments.lr_scheduler_type == "reduce_lr_on_plateau":
            self.schedule.step(loss)
        if not arguments.load_best_model_at_end:
            return
        if state.best_loss is None or loss < state.best_loss:
            state.best_step, state.best_loss, state.worse_validations = state.step, loss, 0
        else:
            state.worse_validations += 1
            state.is_at_end |= state.worse_validations == arguments.early_stopping_patience

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss over all answer tokens of the validation conversations."""
        self.model.eval()
        total, tokens = torch.zeros((), device=self.device), 0
        for name, forward in self.batches.validation():
            here.note(name)
            total += self.summed_loss(forward)
            tokens += len(forward.labels)
        sums = here.gather([float(total), tokens], "the validation loss")
        return sum(loss for loss, _ in sums) / sum(count for _, count in sums)

    @contextlib.contextmanager
    def _progress_bar(self) -> Iterator[Any]:
        from tqdm import tqdm

        is_shown = here.is_first() and sys.stderr.isatty()
        with tqdm(
            total=self.steps, initial=self.state.step, dynamic_ncols=True, leave=False, disable=not is_shown
        ) as bar:
            yield bar

    # Checkpoints

    def _checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def _save(self) -> None:
        """Write a checkpoint and rename it, so that it is complete or absent, even after power loss."""
        state, where = self.state, f"checkpoint {self.state.step}"
        written = self.folder / INCOMING / f"checkpoint-{state.step}"
        state.losses = [told[0] for told in here.gather([float(self._loss)], where)]
        weights = sharding.whole_adapter(self.adapted)
        optimizer = sharding.whole_optimizer(self.adapted, self.optimizer)
        if here.is_first():
            shutil.rmtree(written.parent, ignore_errors=True)
            written.mkdir(parents=True)
        here.meet(where)
        torch.save(_random_numbers(self.device), written / f"random_numbers-{here.rank()}.pt")
        if here.is_first():
            self.adapted.save_pretrained(written, state_dict=weights, save_embedding_layers=False)
            scaler = self._accelerator.scaler
            parts = {"optimizer": optimizer, "schedule": self.schedule.state_dict()}
            torch.save({**parts, "scaler": scaler.state_dict() if scaler else {}}, written / "optimizer.pt")
            text = json.dumps({**asdict(state), **self._spent()}, indent=2)
            (written / STATE_FILE).write_text(text, encoding="utf-8")
        here.meet(where)
        if here.is_first():
            publish(written, self.folder)
            prune(self.folder, self._arguments.save_total_limit, state.best_step)
        here.meet(where)

    def _load_weights(self, checkpoint: Path) -> None:
        weights = load_file(checkpoint / "adapter_model.safetensors")
        if not sharding.load_weights(self.adapted, weights):
            set_peft_model_state_dict(self.adapted, weights)

    def _load(self, checkpoint: Path) -> None:
        stored = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        self.state = TrainingState(**stored)
        self._loss.fill_(self.state.losses[here.rank()])
        self._hand_on(self.state.log)
        if self.state.is_at_end:  # no step is left to train
            return
        parts = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        sharding.load_optimizer(self.adapted, self.optimizer, parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.load_state_dict(parts["scaler"])
        file = checkpoint / f"random_numbers-{here.rank()}.pt"
        self._random_numbers = torch.load(file, map_location="cpu", weights_only=True)

    def _restore_random_numbers(self) -> None:
        """Restore the checkpoint's random state, once."""
        if self._random_numbers is not None:
            torch.set_rng_state(self._random_numbers["cpu"])
            if "cuda" in self._random_numbers:
                torch.cuda.set_rng_state(self._random_numbers["cuda"], self.device)
        self._random_numbers = None

    def _spent(self) -> Record:
        """Time and memory of this training, all parts of an interrupted one together."""
        on_gpu = self.device.type == "cuda"
        now = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        seconds = self.state.seconds + time.perf_counter() - self._began
        return {"seconds": seconds, "peak_bytes": max(self.state.peak_bytes, now)}


def _random_numbers(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators, the only ones that a training uses."""
    cuda = {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {"cpu": torch.get_rng_state(), **cuda}
