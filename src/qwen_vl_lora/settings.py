"""Kedro's settings of this project."""

import copy
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader

from qwen_vl_lora.cluster.here import forget_other_launchers
from qwen_vl_lora.model.devices import wait_passively
from qwen_vl_lora.session.console import project_folder
from qwen_vl_lora.session.given_parameters import hide_templates, show_templates
from qwen_vl_lora.session.hooks import LineageHooks, ProjectHooks, TrackingHooks
from qwen_vl_lora.session.packaged import is_archive, unpacked
from qwen_vl_lora.tracking.choice import PLUGINS

forget_other_launchers()

wait_passively()

# A packaged project has no .telemetry file, which keeps Kedro's usage data from being sent.
DISABLE_HOOKS_FOR_PLUGINS = (*PLUGINS, "kedro-telemetry", "kedro_telemetry")
HOOKS = (ProjectHooks(), LineageHooks(), TrackingHooks())


class TextLoader(OmegaConfigLoader):
    """Kedro's loader, in which `--params` gives values: a `${…}` in them is text. In files it stays a template.

    It reads folders. The archive of `kedro package` becomes one. Each kind of configuration is read once, so that a
    session records and computes with the same settings.
    """

    def __init__(self, conf_source: str, *, runtime_params: dict[str, Any] | None = None, **options: Any) -> None:
        self._trees: dict[str, dict[str, Any]] = {}
        if is_archive(conf_source):
            conf_source = str(unpacked(Path(conf_source), project_folder()))
        super().__init__(conf_source, runtime_params=hide_templates(runtime_params or {}), **options)

    def __getitem__(self, key: str) -> dict[str, Any]:
        if key in self:  # Kedro: set in this session
            return show_templates(super().__getitem__(key))
        if key not in self._trees:
            self._trees[key] = show_templates(super().__getitem__(key))
        return copy.deepcopy(self._trees[key])


CONFIG_LOADER_CLASS = TextLoader
CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # A recipe states only what differs from conf/base; catalog entries are replaced whole.
    "merge_strategy": {"parameters": "soft", "globals": "soft"},
}
