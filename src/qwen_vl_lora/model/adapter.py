"""A trained adapter on disk with its record."""

from __future__ import annotations

import functools
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError
from qwen_vl_lora.faults import library_faults
from qwen_vl_lora.library_parameters import dtype_of
from qwen_vl_lora.model.adapter_record import faults_of_record
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.families import FAMILIES
from qwen_vl_lora.model.fingerprints import stored_tensors, weights_sha256
from qwen_vl_lora.model.lora import excluded_modules, peft_without_noise
from qwen_vl_lora.parameters import GenerationParameters, ImageParameters, Parameters
from qwen_vl_lora.runs.storage import file_sha256
from qwen_vl_lora.samples.conversations import Conversation
from qwen_vl_lora.samples.prompts import TrainedPrompt
from qwen_vl_lora.strict_json import kind_of, read_object

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

RECORD_FILE = "adapter_record.json"
_CONFIG = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that keep the base's weights, and give every layer the configured rank."""

_BASE_EMBEDDING = ".base_layer.weight"
"""The base's own embedding, which older adapters with LoRA on an embedding contain."""

_SAYS_NOTHING = {"base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"}
"""Keys of `adapter_config.json` without effect when the base is given."""

_UNSET = {"megatron_core": "megatron.core", "qalora_group_size": 16, "init_lora_weights": True}
"""PEFT's values for settings that were not set, where they are not null, false or empty."""


@dataclass(frozen=True)
class Adapter:
    """A PEFT directory with `adapter_record.json`."""

    path: Path

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """The adapter's record: its inputs, its settings and the prompt that it was trained with.

        Raises:
            MissingArtifactError: if the directory was not written by this project.
            AdapterError: if the record is not a JSON object, or not a valid `adapter_record.AdapterRecord`.
        """
        try:
            record = self._read_object(RECORD_FILE)
        except FileNotFoundError as error:
            raise MissingArtifactError(
                f"Adapter {self.path} has no {RECORD_FILE}, so base model, prompt and image size are unknown. "
                "Use an adapter that this project trained."
            ) from error
        if faults := faults_of_record(record):
            raise AdapterError(
                f"{self.path / RECORD_FILE} is not a record of an adapter: {'; '.join(faults[:5])}"
                f"{f'; and {len(faults) - 5} more' if len(faults) > 5 else ''}. Use an adapter that this project "
                "trained, and the version of this project that trained it or a newer one."
            )
        return record

    @functools.cached_property
    def weights_sha256(self) -> str:
        """Hex sha256 of the weights' file. Every weight is checked.

        Raises:
            AdapterError: if the file is damaged, or a weight is not finite.
        """
        return weights_sha256(self.path / WEIGHTS_FILE, AdapterError)

    @property
    def config_sha256(self) -> str:
        """Hex sha256 of PEFT's configuration."""
        return file_sha256(self.path / _CONFIG)

    def check_base(self, base_model: BaseModel) -> None:
        """Refuse another base than that of the training, and weights that do not fit it.

        Raises:
            AdapterError: with both fingerprints and the name of the right base, or as `attach`.
        """
        trained = self.record["base_model"]
        if trained["fingerprint"] != base_model.fingerprint:
            name = trained["name"]
            raise AdapterError(
                f"Adapter {self.path} does not fit the base model: trained with {trained['fingerprint']} ({name}), "
                f"configured {base_model.fingerprint} ({base_model.name}). On another base its weights mean nothing: "
                f'--params "base_model={name}", or pin the adapter version that fits: --load-versions "adapter:…".'
            )
        self.check_files()
        _ = self.weights_sha256
        with self._faults_in_words():
            from peft import get_peft_model

            config = self._peft_config()
            # PiSSA and OLoRA limit r to the rank of a layer's weights, which are absent here; `attach` compares shapes.
            has_rank_r = config.init_lora_weights in PLAIN_STARTS
            config.init_lora_weights = False
            structure = get_peft_model(base_model.load_structure(), config, low_cpu_mem_usage=True)
            self._check_tensors(structure, shapes=has_rank_r)

    @property
    def dtype(self) -> Literal["bfloat16", "float16", "float32"]:
        """Precision of the frozen weights in training."""
        return dtype_of(self.record["training_args"])

    @functools.cached_property
    def trained_prompt(self) -> TrainedPrompt:
        """The questions and system texts of the training.

        Raises:
            AdapterError: if the record does not state them.
        """
        try:
            return TrainedPrompt.of_record(self.record["prompt"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise AdapterError(
                f"Adapter {self.path}: `prompt` in {RECORD_FILE} was expected to state user, system and override; "
                f"got {str(self.record.get('prompt'))[:200]}. Take another version of the adapter."
            ) from error

    def check_asked(self, conversations: Sequence[Conversation]) -> None:
        """Refuse conversations if none of them asks the trained question; log the number of others if only some do.

        If several questions were trained, as in question answering, new questions are allowed.

        Raises:
            AdapterError: with both questions.
        """
        strange = self.trained_prompt.untrained(conversations)
        if not strange:
            return
        asked = TrainedPrompt.of_conversations(strange, override=False)
        facts = f"trained with {self.trained_prompt.questions.shown()}, the conversations ask {asked.questions.shown()}"
        if asked.systems.texts != ((None, len(strange)),):
            facts = f"{facts}, system text {asked.systems.shown()}"
        if self.trained_prompt.questions.is_one and len(strange) == len(conversations):
            raise AdapterError(
                f"Adapter {self.path} does not fit the conversations. prompt: {facts}. Evaluate it on conversations "
                "with the trained question, or allow other questions: "
                "scoring.settings_from=adapter."
            )
        logger.info("%d of %d conversations ask untrained questions: %s.", len(strange), len(conversations), facts)

    def trained_settings(self, settings: Parameters) -> Parameters:
        """`settings` with those of the training: picture size, generation, vision, precision, quantization.

        The others stay: the prompt, limits on files, batch size, device.
        """
        trained = ImageParameters.model_validate(self.record["image"])
        generation = {**self.record["generation"], "batch_size": settings.generation.batch_size}
        precision = {"bf16": self.dtype == "bfloat16", "fp16": self.dtype == "float16"}
        return settings.model_copy(
            update={
                "image": settings.image.model_copy(update=trained.size),
                "generation": GenerationParameters.model_validate(generation),
                "vision": self.record["vision"],
                "quantization": self.record.get("quantization"),
                "training_args": settings.training_args.model_copy(update=precision),
            }
        )

    def check_settings(self, settings: Parameters, *, asks: bool) -> None:
        """Refuse another prompt, picture size, `vision` or quantization than in training. Limits on files may differ.

        Args:
            asks: whether `settings.prompt` is asked; otherwise conversations have their own questions.

        Raises:
            AdapterError: with every difference between record and configuration.
        """
        differences = self.differences(settings)
        if asks:
            differences = [*self.trained_prompt.differences(settings.prompt), *differences]
        if differences:
            raise AdapterError(
                f"Adapter {self.path} does not fit the configuration. {'; '.join(differences)}. "
                "Set the parameters to what it was trained with; or use its own: scoring.settings_from=adapter in "
                "evaluation, inference.settings_from=adapter in inference; or pin the adapter version that fits: "
                '--load-versions "adapter:…".'
            )

    def differences(self, settings: Parameters) -> list[str]:
        """In what picture size, `vision` and quantization differ from those of the training."""
        trained = self.trained_settings(settings)
        pairs = {
            "image": (trained.image.size, settings.image.size),
            "vision": (trained.vision, settings.vision),
            "quantization": (trained.quantization, settings.quantization),
        }
        return [
            f"{name}: trained with {theirs}, configured {ours}"
            for name, (theirs, ours) in pairs.items()
            if theirs != ours
        ]

    @property
    def keeps_base(self) -> bool:
        """Whether the base's weights stay as they are under this adapter, so that others can be beside it."""
        lora = self.record["lora"]
        return lora["bias"] == "none" and lora.get("init_lora_weights") in PLAIN_STARTS

    def attach(self, model: PreTrainedModel | PeftModel, name: str = "default") -> PeftModel:
        """The base model with this adapter around it. The base that `adapter_config.json` names is ignored.

        Args:
            model: freshly loaded; or from this method, if all its adapters have `keeps_base`.
            name: of the adapter in the model, without dots. The one attached last is active.

        Raises:
            AdapterError: if `check_files` refuses the files, or they do not belong to `model`.
        """
        from peft import PeftModel

        self.check_files()
        _ = self.weights_sha256
        with self._faults_in_words():
            # PEFT only warns of missing weights, and the adapter would silently have no effect.
            warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
            if isinstance(model, PeftModel):
                model.add_adapter(name, self._peft_config())
                model.load_adapter(self.path, name, local_files_only=True)
                model.set_adapter(name, inference_mode=True)
                attached = model
            else:
                config = self._peft_config()
                attached = PeftModel.from_pretrained(model, self.path, name, config=config, local_files_only=True)
            self._check_tensors(attached, name)
        return attached.eval()

    def _peft_config(self) -> LoraConfig:
        from peft import LoraConfig

        config = LoraConfig.from_pretrained(str(self.path))
        config.base_model_name_or_path = None  # PEFT would look it up on a hub
        return config

    def _check_tensors(self, model: PeftModel, name: str = "default", *, shapes: bool = True) -> None:
        """Check that the file has exactly the tensors of `model`'s adapter, and optionally their shapes.

        Raises:
            AdapterError: naming the tensors that differ.
        """
        from peft import get_peft_model_state_dict

        found = {tensor.name: tensor.shape for tensor in stored_tensors(self.path / WEIGHTS_FILE, AdapterError)}
        wanted = {
            tensor: tuple(value.shape)
            for tensor, value in get_peft_model_state_dict(model, adapter_name=name).items()
            if not tensor.endswith(_BASE_EMBEDDING) or tensor in found
        }
        if not shapes:
            wanted |= {tensor: shape for tensor, shape in found.items() if tensor in wanted}
        wrong = sorted(tensor for tensor in wanted.keys() | found.keys() if wanted.get(tensor) != found.get(tensor))
        if wrong:
            shown = "; ".join(
                f"{tensor}: expected {wanted.get(tensor, 'nothing')}, got {found.get(tensor, 'nothing')}"
                for tensor in wrong[:3]
            )
            raise AdapterError(
                f"Adapter {self.path} does not hold the weights that its {_CONFIG} describes: {len(wrong)} tensors "
                f"differ. {shown}. Its files are damaged or belong to another base. Pin another version "
                "(--load-versions), or train again."
            )

    @contextmanager
    def _faults_in_words(self) -> Iterator[None]:
        """Convert errors of PEFT, safetensors and torch on damaged files."""

        def in_words(said: str) -> AdapterError:
            return AdapterError(
                f"Adapter {self.path} cannot be loaded: {said[:300]} Its files are damaged or belong to "
                "another base. Pin another version (--load-versions), or train again."
            )

        with library_faults(in_words), peft_without_noise():
            warnings.filterwarnings("ignore", message=".*save_embedding_layers", category=UserWarning)
            yield

    def check_files(self) -> None:
        """Check that loading the files runs no code and reads nothing outside the folder. Reads no weights.

        Raises:
            MissingArtifactError: if there is no record.
            AdapterError: if the weights are not a complete safetensors file of floating-point numbers, a file is a link
                that leads outside, or configuration and record are damaged or disagree.
        """
        if not self.path.is_dir():
            raise AdapterError(f"Adapter {self.path} is not a folder. Give the folder of an adapter.")
        if not (self.path / WEIGHTS_FILE).exists():
            raise AdapterError(
                f"Adapter {self.path} lacks {WEIGHTS_FILE}. Adapters stored as pickles are refused, because they can "
                "run code."
            )
        for name in (_CONFIG, WEIGHTS_FILE, RECORD_FILE):
            try:
                place = (self.path / name).resolve()
            except (RuntimeError, OSError) as error:
                raise AdapterError(f"Adapter {self.path}: {name} is a link to itself. Copy the file itself.") from error
            if place.parent != self.path.resolve():
                raise AdapterError(f"Adapter {self.path}: {name} leads outside, to {place}. Copy the file itself here.")
            if place.exists() and not place.is_file():
                kind = kind_of(place.stat().st_mode)
                raise AdapterError(f"Adapter {self.path}: {name} is {kind}; expected a regular file.")
        try:
            config = self._read_object(_CONFIG)
        except FileNotFoundError as error:
            raise AdapterError(f"Adapter {self.path} lacks {_CONFIG}. Take another version of the adapter.") from error
        self._check_config(config)
        _ = list(stored_tensors(self.path / WEIGHTS_FILE, AdapterError))

    def _check_config(self, config: dict[str, Any]) -> None:
        """Check that the configuration makes PEFT do exactly what the record states."""
        if config.get("peft_type") != "LORA":
            raise AdapterError(
                f"Adapter {self.path} is of peft_type {config.get('peft_type')!r}; expected LORA. Other kinds may "
                "load more models than the base."
            )
        if config.get("megatron_config") is not None:
            raise AdapterError(
                f"Adapter {self.path} names a module for PEFT to import (megatron_config in {_CONFIG}), which this "
                "project never does. Set it to null if you trust the rest."
            )
        said = {"task_type": "CAUSAL_LM", "peft_type": "LORA", **self.record["lora"]}
        given, theirs = said.get("exclude_modules"), config.get("exclude_modules")
        excluded = [excluded_modules(given, self.record["vision"], family) for family in FAMILIES]
        said["exclude_modules"] = theirs if theirs in excluded else excluded[0]  # the record names no family
        for name in sorted(said.keys() | config.keys() - _SAYS_NOTHING):
            theirs, ours = config.get(name), said.get(name, _UNSET.get(name))
            if name == "target_modules" and ours == "all-linear" and isinstance(theirs, list):
                continue  # PEFT writes the modules that it found; the tensors are compared with them
            if _plain(theirs) != _plain(ours):
                raise AdapterError(
                    f"Adapter {self.path}: {name} is {str(theirs)[:100]!r} in {_CONFIG}, and {str(ours)[:100]!r} by "
                    f"{RECORD_FILE}, which says how it was trained. One of the files was changed. Take another copy "
                    "of the adapter."
                )
        self._check_patterns(said)

    def _check_patterns(self, lora: dict[str, Any]) -> None:
        """Raises: AdapterError if a pattern of module names is not a regular expression."""
        patterns = [lora["target_modules"], *(lora.get("rank_pattern") or ()), *(lora.get("alpha_pattern") or ())]
        for pattern in patterns:
            try:
                re.compile(pattern if isinstance(pattern, str) else "")
            except (re.error, RecursionError, OverflowError) as error:
                raise AdapterError(
                    f"Adapter {self.path}: {pattern[:100]!r} is not a pattern of module names: {error}. Take another "
                    "version of the adapter."
                ) from error

    def _read_object(self, name: str) -> dict[str, Any]:
        return read_object(self.path / name, AdapterError, "Take another version of the adapter.")


def _plain(value: Any) -> str | None:
    """A setting in comparable form: lists without order, None for unset values."""
    if value is None or value is False or value == [] or value == {}:
        return None
    if isinstance(value, list):
        return json.dumps(sorted(map(json.dumps, value)))
    return json.dumps(value, sort_keys=True)


def note_run(directory: Path, run: dict[str, Any]) -> None:
    """Add the run that trained the adapter to its record."""
    file = directory / RECORD_FILE
    record = {**json.loads(file.read_text(encoding="utf-8")), "run": run}
    file.write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
