"""Checks for LoRA settings that match no module of the base, or would have no effect.

Every fault is a line that begins with its key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen_vl_lora.model.families import Family, family_of
from qwen_vl_lora.parameter_groups import nearest
from qwen_vl_lora.parameters import LoraParameters

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import nn
    from transformers import PreTrainedModel


def missed_linear_attention(family: Family, lora: LoraParameters) -> str:
    """A warning if `target_modules` lists layers of full attention and none of linear attention; else an empty text."""
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules
    names = {target.rpartition(".")[2] for target in targets}
    full = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if name in names]
    if not full or not family.linear_attention or names & set(family.linear_attention):
        return ""
    return (
        f"LoRA does not adapt linear attention, which most layers of {family.name} have: lora.target_modules lists "
        f"{', '.join(full)} of the layers with full attention alone. Add {', '.join(family.linear_attention)}, as the "
        "recipe qwen3_5_4b does, unless that is meant."
    )


class LoraChecks:
    """Checks of the settings of LoRA for one base.

    Args:
        base: before it is wrapped.
        quantized: whether weights that are not packed yet will be.
    """

    def __init__(self, base: PreTrainedModel, lora: LoraParameters, vision: str, *, quantized: bool) -> None:
        self._modules = dict(base.named_modules())
        self._lora, self._quantized = lora, quantized
        self._frozen = None if vision == "adapted" else family_of(base.config)

    def _is_frozen(self, name: str) -> bool:
        """Whether a module is of a tower that is not adapted."""
        return self._frozen is not None and self._frozen.is_in_tower(name)

    def faults_of_names(self) -> list[str]:
        """Settings that match no module of the base, or one that cannot be used; one line for each."""
        from torch import nn

        layers = (nn.Linear, nn.Embedding, nn.Conv3d)  # a Conv1d's weight is read past LoRA by linear attention
        adaptable = [name for name, module in self._modules.items() if isinstance(module, layers)]
        frozen = [name for name in adaptable if self._is_frozen(name)]
        faults = []
        targets = self._lora.target_modules
        for entry in [targets] if isinstance(targets, str) else targets:
            if isinstance(targets, str) and targets.lower() == "all-linear":
                break  # PEFT finds them itself
            found = _matching(targets, self._modules) if isinstance(targets, str) else _ending_with(entry, adaptable)
            others = [name for name in found if name not in adaptable]
            if not found:
                faults.append(f"target_modules: {_not_found(entry, adaptable, whole=isinstance(targets, str))}")
            elif others:
                faults.append(
                    f"target_modules: {entry!r} matches {others[0]}, a {type(self._modules[others[0]]).__name__}, "
                    "which cannot take LoRA; expected linear layers or embeddings alone"
                )
            elif set(found) <= set(frozen):
                faults.append(
                    f"target_modules: {entry!r} names layers of the vision tower only (such as {found[0]}), and vision "
                    "is `frozen`; remove it, or set vision: adapted"
                )
        excluded = self._lora.exclude_modules or []
        if isinstance(excluded, str):
            if not _matching(excluded, adaptable):
                faults.append(f"exclude_modules: {_not_found(excluded, adaptable, whole=True)}")
        else:
            faults += [
                f"exclude_modules: {_not_found(entry, adaptable)}"
                for entry in excluded
                if not _ending_with(entry, adaptable)
            ]
        return faults + self._faults_of_whole_modules()

    def _faults_of_whole_modules(self) -> list[str]:
        modules, entries = self._modules, self._lora.modules_to_save or []
        frozen = [name for name in modules if self._is_frozen(name)]
        faults, chosen = [], {name: entry for entry in entries for name in _ending_with(entry, modules)}
        for entry in entries:
            found = _ending_with(entry, modules)
            # PEFT matches these names without regard to dots.
            others = [name for name in modules if name.endswith(entry) and name not in found]
            if not found:
                faults.append(f"modules_to_save: {_not_found(entry, modules)}")
            elif others:
                faults.append(
                    f"modules_to_save: {entry!r} names {found[0]}, and PEFT would train {others[0]} with it, which "
                    f"ends alike; give more of the name, such as {'.'.join(found[0].split('.')[-2:])!r}"
                )
            elif not all(any(True for _ in modules[name].parameters()) for name in found):
                faults.append(f"modules_to_save: {entry!r} names {found[0]}, which has no weights to train")
            elif any(part in frozen or any(inner.startswith(f"{part}.") for inner in frozen) for part in found):
                faults.append(
                    f"modules_to_save: {entry!r} names {found[0]}, which is or holds a part of the vision tower, and "
                    "vision is `frozen`; remove it, or set vision: adapted"
                )
            elif any(_is_packed(modules[name], quantized=self._quantized) for name in found if name != "lm_head"):
                faults.append(
                    f"modules_to_save: {entry!r} names {found[0]}, whose weights are packed by quantization; remove "
                    "it, or set quantization: null"
                )
        for name, entry in chosen.items():
            outer = next((other for other in chosen if name.startswith(f"{other}.")), None)
            if outer is not None:
                faults.append(
                    f"modules_to_save: {entry!r} names {name}, which is a part of {outer}, named too; remove one"
                )
        return faults

    def faults_of_effect(self, model: PeftModel) -> list[str]:
        """Settings that PEFT accepted but that have no effect, or less than stated; one line for each."""
        adapted = adapted_layers(model)
        return [
            *self._targets_without_effect(adapted),
            *self._layers_without_effect(model, adapted),
            *self._patterns_without_effect(adapted),
            *self._starts_without_effect(adapted),
            *self._biases_without_effect(model),
            *self._vocabulary_under_dora(model),
        ]

    def _targets_without_effect(self, adapted: Mapping[str, LoraLayer]) -> list[str]:
        if isinstance(self._lora.target_modules, str):
            return []
        return [
            f"target_modules: {entry!r} names {_ending_with(entry, self._modules)[0]}, which exclude_modules, "
            "modules_to_save or layers_to_transform leaves out; remove it from one of them"
            for entry in self._lora.target_modules
            if not _ending_with(entry, adapted)
        ]

    def _layers_without_effect(self, model: PeftModel, adapted: Mapping[str, LoraLayer]) -> list[str]:
        from peft.tuners.tuners_utils import check_target_module_exists

        def reaches(**one: Any) -> bool:
            config = replace(model.peft_config["default"], **one)
            # PEFT adapts a layer that the list names in full, whatever its index.
            found = (
                check_target_module_exists(config, name) for name in adapted if name not in self._lora.target_modules
            )
            return any(one is True for one in found)

        last = model.get_base_model().config.get_text_config().num_hidden_layers - 1
        layers, lists = self._lora.layers_to_transform, self._lora.layers_pattern
        faults = [
            f"layers_to_transform: {layer} adapts no layer; expected indices from 0 to {last}, and ends of "
            "names in target_modules, such as q_proj"
            for layer in ([layers] if isinstance(layers, int) else layers or [])
            if not reaches(layers_to_transform=layer)
        ]
        return faults + [
            f"layers_pattern: {entry!r} names no list of layers that is adapted"
            for entry in ([lists] if isinstance(lists, str) else lists or [])
            if not reaches(layers_pattern=entry)
        ]

    def _patterns_without_effect(self, adapted: Mapping[str, LoraLayer]) -> list[str]:
        from peft.utils.other import get_pattern_key

        faults = []
        for name, pattern in {
            "rank_pattern": self._lora.rank_pattern or {},
            "alpha_pattern": self._lora.alpha_pattern or {},
        }.items():
            chosen: dict[str, str] = {}
            for key in pattern:
                layers = [layer for layer in adapted if get_pattern_key([key], layer) == key]
                if not layers:
                    faults.append(f"{name}: {key!r} matches no adapted layer")
                # PEFT uses the first match, and stores the patterns in alphabetical order.
                twice = next((layer for layer in layers if layer in chosen), None)
                if twice is not None:
                    faults.append(
                        f"{name}: {chosen[twice]!r} and {key!r} both match {twice}, and the first would count in "
                        "training, but not where the adapter is loaded; expected one match for each layer"
                    )
                chosen |= dict.fromkeys(layers, key)
        return faults

    def _starts_without_effect(self, adapted: Mapping[str, LoraLayer]) -> list[str]:
        from torch import nn

        start = self._lora.init_lora_weights
        if start not in ("pissa", "olora", "orthogonal"):
            return []
        for name, layer in adapted.items():
            if isinstance(layer.get_base_layer(), nn.Embedding):
                return [
                    f"init_lora_weights: PEFT ignores `{start}` for the embedding {name}; remove it from the targets"
                ]
            rank, most = layer.r["default"], min(layer.in_features, layer.out_features)
            if start != "orthogonal" and rank > most:
                return [
                    f"init_lora_weights: `{start}` can give {name} at most rank {most}; got {rank} (r or rank_pattern)"
                ]
        return []

    def _biases_without_effect(self, model: PeftModel) -> list[str]:
        if self._lora.bias == "none" or any(
            parameter.requires_grad and name.endswith(".bias") and ".modules_to_save." not in name
            for name, parameter in model.named_parameters()
        ):
            return []
        return [f"bias: `{self._lora.bias}` trains nothing, because no adapted layer has a bias; set bias: none"]

    def _vocabulary_under_dora(self, model: PeftModel) -> list[str]:
        from peft.tuners.lora import LoraLayer

        inner: Any = model.get_base_model()
        ends = {"embed_tokens": inner.get_input_embeddings(), "lm_head": inner.get_output_embeddings()}
        return [
            f"use_dora: DoRA divides by the norm of each token's weights in {name}, and a token without weights, such "
            f"as padding, gives NaN; remove {name} from the targets, or set use_dora: false"
            for name, end in ends.items()
            if self._lora.use_dora and isinstance(end, LoraLayer)
        ]


def _is_packed(module: nn.Module, *, quantized: bool) -> bool:
    from torch import nn

    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return any(quantized or not part.weight.is_floating_point() for part in linear)


def _ending_with(entry: str, names: Iterable[str]) -> list[str]:
    """The names that PEFT matches with an entry of a list."""
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that PEFT matches with a regular expression."""
    return [name for name in names if re.fullmatch(pattern, name)]


def _not_found(entry: str, names: Iterable[str], *, whole: bool = False) -> str:
    if whole:
        return (
            f"the regular expression {entry!r} matches no layer of the base; expected one for whole names, such as "
            r"'.*\.language_model\..*\.q_proj'; for ends of names give a list, such as [q_proj]"
        )
    ends = {name.rpartition(".")[2] for name in names}
    ends = {end for end in ends if not end.isdigit()}
    close = nearest(entry, ends) or f"; expected one of {', '.join(sorted(ends))}"
    return f"{entry!r} matches no module that this key can name{close}"


def adapted_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The layers with LoRA, by their names in the base."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)}
