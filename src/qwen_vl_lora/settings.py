"""Kedro's settings of this project."""

import os

from qwen_vl_lora.hooks import LineageHooks, ProjectHooks, TrackingHooks

# Threads that wait in a busy loop slow each other down several times where other work shares the cores.
# Read when torch is imported, which is after this.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

HOOKS = (ProjectHooks(), LineageHooks(), TrackingHooks())

CONFIG_LOADER_ARGS = {
    "base_env": "base",
    "default_run_env": "local",
    # A recipe states only what differs from conf/base; catalog entries are replaced whole.
    "merge_strategy": {"parameters": "soft", "globals": "soft"},
}
