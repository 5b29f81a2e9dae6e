"""Kedro's settings of this project."""

from qwen_vl_lora.hooks import LineageHooks, ProjectHooks

HOOKS = (ProjectHooks(), LineageHooks())

CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # A recipe states only what differs from conf/base; catalog entries are replaced whole.
    "merge_strategy": {"parameters": "soft", "globals": "soft"},
}
