"""Trackers are called in order by a run's hooks, one that fails stops nothing, and nothing else knows their names."""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from kedro.framework.hooks.manager import _create_hook_manager, _register_hooks_entry_points
from kedro.io import DataCatalog
from kedro.pipeline import node, pipeline
from kedro.runner import SequentialRunner

from docs.blocks import PROJECT, shown_under
from qwen_vl_lora import settings as project_settings
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.runs.run import begin_run, end_run
from qwen_vl_lora.session import hooks
from qwen_vl_lora.tracking import choice
from qwen_vl_lora.tracking.tracker import TrackedRun, Tracker, current_tracker
from tracking.runs import METRICS, picture, pictures, row

SOURCE = PROJECT / "src" / "qwen_vl_lora"


@pytest.fixture
def tree():
    tree = yaml.safe_load((PROJECT / "conf" / "base" / "parameters.yml").read_text(encoding="utf-8"))
    return {**tree, "swanlab": {**tree["swanlab"], "mode": "disabled"}}


@pytest.fixture
def shown(monkeypatch):
    """`choose_trackers` with what CONTRIBUTING.md adds to it, in a house that has the file it shows."""
    file, added = shown_under("Add a tracker")
    names: dict = {}
    exec(file, names)
    source = inspect.getsource(choice)
    names = {**vars(choice), "LinesTracker": names["LinesTracker"]}
    exec(source.replace("    return trackers\n", f"    {added}    return trackers\n"), names)
    monkeypatch.setattr(hooks, "choose_trackers", names["choose_trackers"])


def train(log_rows=2):
    for step in range(1, log_rows + 1):
        current_tracker().log_row(row(step, 1 / step))
    return pd.DataFrame()


def evaluate():
    told = {"references": '["a dog"]', "tuned_caption": "a dog", "base_caption": "a", "image_path": "dog.png"}
    store = SimpleNamespace(by_path=lambda path: SimpleNamespace(sha256=path), open=lambda sha256: picture(9))
    return pd.DataFrame([told]), METRICS, store


def fail():
    raise ParameterError("r is 0, and the password=hunter2222")


class Loader(dict):
    """Kedro's loader of a configuration, as far as the hooks ask it."""

    conf_source = str(PROJECT / "conf")


def run(tree, project, *nodes, **written):
    """A small run that Kedro's own runner makes, around it the project's hooks."""
    begun = begin_run("now")
    begun.facts["parameters"] = {"lora": {"r": 8}, "api_key": "Secret-12345"}
    begun.written |= written
    named = pipeline(nodes)
    manager = _create_hook_manager()
    manager.register(hooks.TrackingHooks())
    loader = Loader({"parameters": tree, "globals": {"recipe": "tiny"}})
    manager.hook.after_context_created(context=SimpleNamespace(config_loader=loader, project_path=project, env=None))
    about = {"run_params": {}, "pipeline": named, "catalog": DataCatalog()}
    manager.hook.before_pipeline_run(**about)
    try:
        SequentialRunner().run(named, about["catalog"], manager)
    except ParameterError as error:
        manager.hook.on_pipeline_error(error=error, **about)
    else:
        manager.hook.after_pipeline_run(run_result={}, **about)
    finally:
        end_run(finished=True)


TRAINING = node(train, None, "training_log", name="train")
EVALUATION = (
    node(evaluate, None, ["predictions", "caption_metrics", "images"], name="evaluate"),
    node(lambda *inputs: "page", ["predictions", "caption_metrics", "images"], "comparison_report", name="report"),
)


def lines_of(project):
    (file,) = (project / "logs" / "lines" / "tiny").iterdir()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_tracker_made_as_contributing_says_gets_outline_rows_pictures_and_end_in_order(shown, tree, tmp_path):
    run(tree, tmp_path, TRAINING, *EVALUATION)
    opened, first, second, held_out, measured, end = lines_of(tmp_path)
    assert opened == {"open": {"run": "now", "parameters.lora.r": 8, "parameters.api_key": "***"}}
    assert (first["step"], first["row"]["train/loss"]) == (1, 1.0)
    assert (second["step"], second["row"]["train/loss"]) == (2, 0.5)
    assert held_out == {"step": 2, "pictures": [[[256, 183], "tuned: a dog\nbase: a\nreference: a dog"]]}
    assert measured["step"] == 2
    assert measured["row"]["evaluation/tuned/CIDEr"] == METRICS["tuned"]["CIDEr"]
    assert end == {"end": "finished", "error": None}
    assert current_tracker() is None


def test_a_run_that_fails_ends_its_trackers_with_the_masked_error(shown, tree, tmp_path):
    run(tree, tmp_path, TRAINING, node(fail, None, "nothing", name="z_fail"))
    assert lines_of(tmp_path)[-1] == {"end": "failed", "error": "ParameterError: r is 0, and the password=***"}


def test_a_run_that_neither_trains_nor_evaluates_starts_no_tracker(shown, tree, tmp_path):
    run(tree, tmp_path, node(lambda: 1, None, "samples", name="collect"))
    assert not (tmp_path / "logs").exists()


class Noted(Tracker):
    """Notes its calls, and fails in those that are named."""

    def __init__(self, name, *failing):
        self.name, self.failing, self.calls = name, failing, []

    def _note(self, call):
        self.calls.append(call)
        if call in self.failing:
            raise OSError(f"no {call} with password=hunter2222")

    def start(self):
        self._note("start")

    def open(self, identity, outline):
        self.identity = identity
        self._note("open")

    def row(self, values, step):
        self._note("row")

    def pictures(self, shown, step):
        self.texts = [text for _, text in shown]
        self._note("pictures")

    def adapter(self, directory):
        self.directory = directory
        self._note("adapter")

    def end(self, outcome, error, outline):
        self._note("end")

    def drop(self):
        self._note("drop")


CALLS = ["start", "open", "row", "adapter", "pictures", "row", "end"]


def whole_run(*trackers):
    tracked = TrackedRun(trackers)
    tracked.log_row(row(1, 0.5))
    tracked.log_adapter(Path("adapter"))
    tracked.log_evaluation(METRICS, pictures)
    tracked.end("finished")


@pytest.mark.parametrize("call", CALLS)
def test_a_tracker_that_fails_is_dropped_and_the_others_get_everything(call, caplog):
    caplog.set_level(logging.WARNING)
    bad, good = Noted("Bad", call, "drop"), Noted("Good")
    whole_run(bad, good)
    assert good.calls == CALLS
    assert bad.calls == [*CALLS[: CALLS.index(call) + 1], "drop"]
    assert [record.getMessage() for record in caplog.records] == [
        f"Bad stopped recording this run (OSError: no {call} with password=***); the run continues."
    ]


def test_every_tracker_sees_all_pictures_and_the_same_identity():
    one, two = Noted("One"), Noted("Two")
    whole_run(one, two)
    assert one.texts == two.texts == [text for _, text in pictures()]
    assert one.identity == two.identity


def test_the_adapter_is_passed_on_as_soon_as_it_is_saved(monkeypatch, tree, tmp_path):
    tracker = Noted("Noted")
    monkeypatch.setattr(hooks, "choose_trackers", lambda *arguments: [tracker])
    saved = node(lambda log: "a", "training_log", "adapter", name="save")
    run(tree, tmp_path, TRAINING, saved, adapter={"path": "data/06_models/tiny/adapter/now/adapter"})
    assert tracker.directory == tmp_path / "data/06_models/tiny/adapter/now/adapter"
    assert tracker.calls == ["start", "open", "row", "row", "adapter", "end"]


def test_without_rows_a_tracker_is_dropped_and_never_opened():
    tracker = Noted("Noted")
    tracked = TrackedRun([tracker])
    tracked.end("failed", "no rows")
    tracked.log_row(row(1, 0.5))
    assert tracker.calls == ["start", "drop"]


def test_a_disabled_tracker_is_not_made(tree, tmp_path):
    assert choice.choose_trackers(validate_parameters(tree), tmp_path, "tiny") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("plugin", "is_called"), [("kedro_mlflow", False), ("kedro-mlflow", False), ("another", True)])
def test_the_hooks_of_a_plugin_that_would_send_secrets_are_not_called(monkeypatch, tmp_path, plugin, is_called):
    """`kedro-mlflow` sends all parameters unmasked, and stops a run whose server is away."""
    (tmp_path / "planted_plugin.py").write_text(
        "from kedro.framework.hooks import hook_impl\n\n\nclass Hooks:\n    @hook_impl\n"
        "    def after_context_created(self, context):\n        context.append('called')\n\n\nhooks = Hooks()\n"
    )
    about = tmp_path / f"{plugin.replace('-', '_')}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {plugin}\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[kedro.hooks]\nplanted = planted_plugin:hooks\n")
    monkeypatch.syspath_prepend(tmp_path)
    manager = _create_hook_manager()
    _register_hooks_entry_points(manager, project_settings.DISABLE_HOOKS_FOR_PLUGINS)
    said: list[str] = []
    for called in manager.hook.after_context_created.get_hookimpls():
        if called.plugin_name == "planted":
            called.function(context=said)
    del sys.modules["planted_plugin"]
    assert said == (["called"] if is_called else [])


def test_no_other_room_names_a_tracker():
    named = re.compile("swanlab|mlflow|tensorboard|wandb", re.IGNORECASE)
    paths = [path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if named.search(path.read_text("utf-8"))]
    allowed = {Path("parameters.py")}
    assert [path for path in paths if path.parts[0] != "tracking"] == sorted(allowed)
    assert {path.name for path in paths if path.parts[0] == "tracking"} == {
        "boards.py",
        "choice.py",
        "mlflow.py",
        "mlflow_writer.py",
        "swanlab.py",
        "swanlab_writer.py",
        "tensorboard.py",
    }
