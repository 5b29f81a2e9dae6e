"""Saves catalog entries, each in a fork that may die on the way.

Reads one JSON line for each save: {"folder", "entry", "version", "which", "moment"}; answers with the exit status.
"""

import gc
import json
import os
import sys
from pathlib import Path

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what Kedro prints goes to stderr

import pandas  # noqa: E402, F401
import plotly.graph_objects  # noqa: E402, F401

import samples.pictures  # noqa: E402, F401
from faults.saves import entries_of_each_type, open_entry, save  # noqa: E402
from qwen_vl_lora.features import store  # noqa: E402, F401

for name in entries_of_each_type():
    open_entry(Path.cwd(), name)  # imports its classes
gc.collect()
gc.freeze()  # or each fork would read, and so copy, all of it

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            save(json.loads(line))
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
