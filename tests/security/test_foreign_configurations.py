"""A run record, replay.yml or --config file of a stranger gives values and nothing else."""

import functools
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kedro.config import OmegaConfigLoader
from kedro.framework.session import KedroSession

from qwen_vl_lora.cli import cli
from qwen_vl_lora.exceptions import DataFormatError, ParameterError
from qwen_vl_lora.runs.foreign import (
    SEAL_FILE,
    Permissions,
    leaves,
    outside_paths,
    permit,
    read_values,
    seal_of,
    without_interpolations,
)
from qwen_vl_lora.runs.replay import check_foreign_configuration, stored_configuration
from qwen_vl_lora.session.configuration import check_configuration, check_option_names
from qwen_vl_lora.settings import CONFIG_LOADER_ARGS

PROJECT = Path(__file__).parents[2]
RUN = "2026-01-01T00.00.00.000Z"


@pytest.fixture(autouse=True)
def nothing_is_permitted():
    yield
    permit(Permissions())


@functools.cache
def stored_by_a_run():
    """What a run of the project would store of its configuration."""
    loader = OmegaConfigLoader(str(PROJECT / "conf"), **CONFIG_LOADER_ARGS)
    replay = {"run": {"conf_source": f"data/08_reporting/tiny/runs/{RUN}/conf", "env": "base"}}
    return stored_configuration(loader["catalog"], loader["parameters"], loader["globals"], replay)


@pytest.fixture
def stranger(project):
    """`stranger(parameters={"image.allow_urls": True})`: a run's folder where the docs say to copy it, changed."""

    def make(where="data/08_reporting/tiny/runs", *, catalog=None, parameters=None, shared=None, **options):
        folder = project / where / RUN
        for name, text in stored_by_a_run().items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        change(folder / "conf/base/catalog.yml", catalog or {})
        change(folder / "conf/base/parameters.yml", parameters or {})
        change(folder / "conf/base/globals.yml", shared or {})
        source = os.path.relpath(folder / "conf", project)
        run = {"conf_source": source, "env": "base", "pipelines": "data_engineering", **options}
        (folder / "replay.yml").write_text(yaml.safe_dump({"run": run}))
        return folder

    return make


def change(file, changes):
    if not changes:
        return
    tree = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
    for key, value in changes.items():
        *above, last = key.split(".")
        place = tree
        for part in above:
            place = place[part]
        place[last] = value
    file.write_text(yaml.dump(tree, Dumper=yaml.CSafeDumper))


def kedro_run(*arguments):
    return CliRunner().invoke(cli, ["run", "--verbose", *arguments])


def refusal(*arguments):
    """The message with which `kedro run` ended before anything was instantiated."""
    done = kedro_run(*arguments)
    assert isinstance(done.exception, ParameterError), (done.exception, done.output)
    return str(done.exception)


def check(project, folder=None, typed=None, env="base", **permissions):
    """What a session does with its configuration before its catalog is made."""
    source = project / "conf" if folder is None else folder / "conf"
    permit(Permissions(**permissions))
    loader = OmegaConfigLoader(str(source), env=env, runtime_params=typed, **CONFIG_LOADER_ARGS)
    check_configuration(SimpleNamespace(config_loader=loader, project_path=project, env=env))


def refused(*arguments, **options):
    """The message of the refusal."""
    with pytest.raises(ParameterError) as caught:
        check(*arguments, **options)
    return str(caught.value)


def refused_files(project, folder):
    with pytest.raises(ParameterError) as caught:
        check_foreign_configuration(folder / "conf", project / "conf")
    return str(caught.value)


def nothing_was_written(project):
    assert not (project / "PWNED").exists()
    assert {path.name for path in (project / "data").iterdir()} <= {"08_reporting", "01_raw"}
    assert {path.name for path in project.iterdir()} <= {
        "conf",
        "data",
        "pyproject.toml",
        "src",
        "elsewhere",
        "run.yml",
    }


class Mark:
    def __reduce__(self):
        return os.system, ("touch PWNED",)


@pytest.fixture
def planted(project):
    """A folder that holds a catalog with a pickle, as an attacker may bring one along."""
    folder = project / f"data/08_reporting/tiny/runs/{RUN}/conf/base"
    folder.mkdir(parents=True)
    (folder / "rows.bin").write_bytes(pickle.dumps(Mark()))
    entry = {"type": "pickle.PickleDataset", "filepath": (folder / "rows.bin").relative_to(project).as_posix()}
    (folder / "catalog.yml").write_text(yaml.safe_dump({"captioned_images": entry}))
    (folder / "parameters.yml").write_text("{}")
    return folder


@pytest.mark.parametrize("absolute", [False, True])
def test_an_environment_that_is_a_path_is_refused_in_a_config_file(project, planted, absolute):
    env = str(planted) if absolute else f"../{planted.relative_to(project).as_posix()}"
    replay = planted.parents[1] / "replay.yml"
    replay.write_text(yaml.safe_dump({"run": {"env": env, "pipelines": "data_engineering"}}))
    assert "--env: expected a name" in refusal("--config", str(replay))
    assert "--env: expected a name" in refusal("--env", env)
    nothing_was_written(project)


def test_an_environment_that_is_a_path_is_refused_in_a_session_and_in_the_process_environment(
    project, planted, monkeypatch
):
    env = f"../{planted.relative_to(project).as_posix()}"
    with pytest.raises(ParameterError, match="--env: expected a name"), KedroSession.create(env=env) as session:
        session.run()
    monkeypatch.setenv("KEDRO_ENV", env)
    assert "--env: expected a name" in refusal()
    nothing_was_written(project)


@pytest.mark.parametrize("recipe", ["../../../OUTSIDE", "/tmp/outside", "a/b", "..", "", None, "~", ".hidden", 3])
def test_a_recipe_that_is_a_path_is_refused_wherever_it_stands(project, stranger, recipe):
    for folder in (stranger(shared={"recipe": recipe}), stranger(parameters={"recipe": recipe})):
        assert "recipe: expected a name" in refused_files(project, folder)
        assert "recipe: expected a name" in refused(project, folder)
    assert "recipe: expected a name" in refused(project, typed={"recipe": recipe})
    change(project / "conf/base/globals.yml", {"recipe": recipe})
    assert "recipe: expected a name" in refused(project)


def test_a_run_with_such_a_recipe_writes_nothing(project, stranger):
    replay = stranger(shared={"recipe": "../../../OUTSIDE"}) / "replay.yml"
    assert "recipe: expected a name" in refusal("--config", str(replay))
    assert "recipe: expected a name" in refusal("--params", "recipe=../../../OUTSIDE")
    nothing_was_written(project)


@pytest.mark.parametrize(
    "options",
    [
        {"pipelines": ["training", "../x"]},
        {"pipeline": "a/b"},
        {"pipelines": ["os.path/x"]},
        {"env": "/etc"},
        {"load_versions": {"images": "a b"}},
        {"load_versions": {"images": "../x"}},
    ],
)
def test_pipelines_versions_and_environments_of_ones_own_command_line_are_names(options):
    with pytest.raises(ParameterError, match="expected a name"):
        check_option_names(options)


def test_the_command_line_checks_its_names(project):
    assert "--pipelines: expected a name" in refusal("--pipelines", "training,../x")
    assert "--load-versions images: expected a name" in refusal("-lv", "images:a b")
    assert "expected a folder" in refusal("--conf-source", "https://example.org/conf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runner": "os.system"}, "names the runner 'os.system'"),
        ({"runner": "run_node"}, "names the runner 'run_node'"),
        ({"trust": True}, "Give it on the command line"),
        ({"allow_path": "/"}, "Give it on the command line"),
        ({"config": "other.yml"}, "Give it on the command line"),
        ({"pipelnes": "training"}, "nearest: pipeline"),
        ({"tags": ["a"]}, "tags: expected text"),
        ({"load_versions": {"images": "x"}}, "load_versions: expected text"),
        ({"only_missing_outputs": "yes"}, "only_missing_outputs: expected true or false"),
        ({"env": "${oc.env:HOME}"}, "contains an interpolation"),
        ({"params": {"prompt": {"user": "${globals:recipe}"}}}, "contains an interpolation"),
        ({"params": {"${oc.env:HOME}": 1}}, "contains an interpolation"),
    ],
)
def test_options_of_a_config_file_are_values_of_known_options(project, options, message):
    (project / "run.yml").write_text(yaml.safe_dump({"run": options}))
    assert message in refusal("--config", "run.yml")


@pytest.mark.parametrize("text", ["", "[1]", "run: 3", "run: {}\nother: 1", "run: [", "run: !!python/name:os.system x"])
def test_a_config_file_of_another_form_is_refused(project, text):
    (project / "run.yml").write_text(text)
    assert "run.yml" in refusal("--config", "run.yml")


@pytest.mark.parametrize("text", ['"\\x24{globals:up}"', "!!str '${globals:up}'"])
@pytest.mark.parametrize("file", ["catalog.yml", "globals.yml", "catalog/more.json", "sub/parameters.yml"])
def test_an_interpolation_is_refused_however_it_is_written(project, stranger, text, file):
    folder = stranger()
    target = folder / "conf/base" / file
    target.parent.mkdir(exist_ok=True)
    target.write_text(f"recipe_: {{deep: [{text}]}}\n")
    assert "contains an interpolation" in refused_files(project, folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x\n", "alias"),
        ("recipe: tiny\nrecipe: other\n", "is not valid YAML"),
        ("a: !!python/object/apply:os.system [id]\n", "is not valid YAML"),
        ("a: !!python/object/apply:pathlib.Path [/etc]\n", "holds a "),
        ("a: !!binary aGVsbG8=\n", "holds a bytes"),
        ("[" * 20000, "is nested deeper"),
        ("a: '${'\n", "contains an interpolation"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_yaml_that_is_more_than_values_is_refused_by_its_file(project, stranger, text, message):
    folder = stranger()
    (folder / "conf/base/globals.yml").write_text(text)
    said = refused_files(project, folder)
    assert message in said
    assert "globals.yml" in said


def test_links_archives_and_credentials_are_refused(project, stranger, tmp_path_factory):
    folder = stranger()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "catalog.yml").write_text("{}")
    link = folder / "conf/base/catalog_more"
    link.symlink_to(elsewhere)
    assert "may not contain links" in refused_files(project, folder)
    link.unlink()
    (folder / "conf/base/credentials.yml").write_text("mine: {key: value}")
    assert "contains credentials" in refused_files(project, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captioned_images": {"type": "pickle.PickleDataset", "filepath": "data/x"}}, "'pickle.PickleDataset'"),
        ({"captioned_images": {"type": "json.JSONDataset", "filepath": "https://example.org/x"}}, "on this machine"),
        ({"captioned_images": {"type": "json.JSONDataset", "filepath": "simplecache::x"}}, "on this machine"),
        ({"samples.filepath": "data/../../x.json"}, "must lie below data/"),
        ({"samples.filepath": "data/~/x.json"}, "must lie below data/"),
        ({"samples.filepath": "data/x::https://example.org/y"}, "must lie below data/"),
        ({"samples.filepath": ["data/x"]}, "must lie below data/"),
        ({"samples.dataset.filepath": "/etc/passwd"}, "must lie below data/"),
        ({"workspace.filepath": "/tmp/x"}, "must lie below data/"),
        ({"tiny_base.filepath": "conf/base"}, "must lie below data/"),
        ({"{any}": {"type": "json.JSONDataset", "filepath": "{any}"}}, "must lie below data/"),
        ({"{any}_x": {"type": "{any}.PickleDataset", "filepath": "data/x"}}, "dataset type"),
        ({"samples@pickle": {"type": "pickle.PickleDataset", "filepath": "data/x"}}, "'pickle.PickleDataset'"),
        ({"samples.credentials": "mine"}, "has the key 'credentials'"),
        ({"samples.dataset.load_args": {"engine": "x"}}, "has the key 'engine'"),
        ({"samples.dataset.fs_args": {}}, "has the key 'fs_args'"),
        ({"samples.validator": "os.system"}, "has the key 'validator'"),
        ({"samples": "text"}, "expected a mapping"),
    ],
)
def test_a_catalog_entry_that_does_more_is_refused(project, stranger, change, message):
    assert message in refused_files(project, stranger(catalog=change))


def test_what_kedro_resolves_is_checked_too_and_no_word_helps(project, stranger):
    folder = stranger(catalog={"samples.filepath": "conf/base/catalog.yml"})
    assert "must lie below data/" in refused(project, folder, trust=True, paths=(Path("/"),))


OPENINGS = {
    "image.allow_urls": True,
    "image.url_hosts": ["evil.example"],
    "image.allowed_roots": ["/"],
    "swanlab.mode": "online",
    "swanlab.workspace": "somebody",
    "mlflow.tracking_uri": "https://evil.example",
    "mlflow.experiment": "somebody's",
    "cluster.address": "10.0.0.1:6379",
    "inference.server.address": "https://elsewhere.example/v1",
    "evaluation.judge.address": "https://elsewhere.example/v1",
    "evaluation.clip_score": "hf:somebody/clip",
    "evaluation.contenders": [{"name": "x", "server": {"address": "https://elsewhere.example/v1"}}],
    "inference.output.sidecars": "beside",
    "inference.output.jsonl": "captions.jsonl",
}


def tree_of(changes):
    tree = {}
    for key, value in changes.items():
        *parents, last = key.split(".")
        functools.reduce(lambda group, parent: group.setdefault(parent, {}), parents, tree)[last] = value
    return tree


@pytest.mark.parametrize(("key", "value"), OPENINGS.items())
def test_what_a_strangers_parameters_open_is_shown_and_needs_a_word(project, stranger, key, value):
    typed = tree_of({key: value})
    for said in (
        refused(project, stranger(parameters={key: value})),
        refused(project, typed=typed, options=project / "run.yml"),
    ):
        assert f"{key}: {value}" in said
        assert "Add --trust" in said


@pytest.mark.parametrize("place", ["hf:somebody/data", "ms:somebody/data@v1"])
def test_a_data_set_on_a_hub_that_a_stranger_names_is_shown_and_needs_a_word(project, stranger, place):
    type_name = "qwen_vl_lora.datasets.sources.CaptionsFileDataset"
    entries = [place, [{"name": "a", "filepath": place, "num_rows": 3}, "data/01_raw/b.csv"]]
    folders = [stranger(parameters={"captions_file": place})] + [
        stranger(where=f"data/{number}", catalog={"captioned_images": {"type": type_name, "filepath": entry}})
        for number, entry in enumerate(entries)
    ]
    (project / "conf/mine").mkdir()
    own = {"captioned_images": {"type": type_name, "filepath": [{"name": "x", "filepath": "c.csv", "num_rows": 1}]}}
    (project / "conf/mine/catalog.yml").write_text(yaml.safe_dump(own))
    for folder in folders:
        said = refused(project, folder)
        assert f"captions_file: {place}" in said
        assert "Add --trust" in said
        check(project, folder, trust=True)


def test_captions_on_s3_that_a_stranger_names_are_shown_and_need_a_word(project, stranger):
    folder = stranger(parameters={"captions_file": "s3://somebody/data.csv"})
    said = refused(project, folder)
    assert "captions_file: s3://somebody/data.csv" in said
    assert "Add --trust" in said
    check(project, folder, trust=True)


def test_what_opens_needs_no_word_where_the_user_wrote_it_and_none_twice(project, stranger):
    folder = stranger(parameters=OPENINGS)
    typed = tree_of(OPENINGS)
    said = refused(project, folder)
    assert all(f"{key}: {value}" in said for key, value in OPENINGS.items())
    assert "image.allow_urls: True" in refused(project, stranger(), typed=typed, options=project / "run.yml")
    check(project, stranger(parameters=OPENINGS), trust=True)
    check(project, typed=typed, options=project / "run.yml", trust=True)
    check(project, typed=typed)
    check(project, stranger(), typed=typed)
    check(project, typed=typed, options=project / "conf/local/run.yml")
    change(project / "conf/base/parameters.yml", OPENINGS)
    check(project, stranger(parameters=OPENINGS))


def test_the_words_are_options_of_kedro_run(project, stranger):
    changes = {"image.allow_urls": True, "captions_file": "/elsewhere/captions.csv"}
    replay = str(stranger("elsewhere", parameters=changes) / "replay.yml")
    said = refusal("--config", replay)
    assert "image.allow_urls: True" in said
    assert "captions_file: /elsewhere/captions.csv" in said
    done = kedro_run("--config", replay, "--trust", "--allow-path", "/elsewhere", "--pipelines", "training")
    assert "MissingArtifactError" in repr(done.exception)  # it came as far as its inputs, of which there are none


def test_swanlabs_cloud_needs_a_word_where_the_environment_holds_a_key(project, stranger, monkeypatch):
    change(project / "conf/base/parameters.yml", {"swanlab.mode": "offline"})
    folder = stranger(parameters={"swanlab.mode": "auto"})
    check(project, folder)
    monkeypatch.setenv("SWANLAB_API_KEY", "x" * 20)
    assert "swanlab.mode: auto" in refused(project, folder)


def test_a_tracker_on_a_server_needs_a_word(project, stranger):
    check(project, stranger(parameters={"trackers": ["tensorboard"]}))
    assert "trackers: ['mlflow']" in refused(project, stranger(parameters={"trackers": ["swanlab", "mlflow"]}))


def test_code_and_hosts_of_a_hub_and_another_base_of_it_need_a_word(project, stranger):
    coco = yaml.safe_load((project / "conf/qwen2_vl_2b_coco/catalog.yml").read_text())["captioned_images"]
    check(project, stranger(catalog={"captioned_images": coco}))
    said = refused(project, stranger(catalog={"captioned_images": {**coco, "image_hosts": ["evil.example"]}}))
    assert "image_hosts.0: evil.example" in said
    assert "trust_remote_code: True" in said
    assert "base_model: somebody/base" in refused(project, stranger(catalog={"base_model.model": "somebody/base"}))
    assert "base_model: hf:some/base" in refused(project, stranger(catalog={"base_model.model": "hf:some/base"}))
    own = {"base_model.model": "Qwen/Qwen2-VL-2B-Instruct@master"}
    check(project, stranger(catalog=own))
    elsewhere = {**own, "base_model.hub": "huggingface"}  # the same name may be another owner's there
    assert "base_model: hf:Qwen/Qwen2-VL-2B-Instruct@master" in refused(project, stranger(catalog=elsewhere))
    change(project / "conf/base/globals.yml", {"hub": "huggingface"})
    check(project, stranger(catalog=elsewhere))


OUTSIDE = {
    "captions_file": "/elsewhere/captions.csv",
    "base_model": "../../../base",
    "init_adapter": "~/adapter",
    "inference.images": "/elsewhere",
    "evaluation.clip_score": "/elsewhere/clip",
    "resume": "/elsewhere/checkpoint-1",
}


def test_contenders_outside_are_listed_too(project, stranger):
    listed = [{"name": "one", "adapter": "/elsewhere/adapter"}, {"name": "two", "model": "../../../model"}]
    said = refused(project, stranger("elsewhere", parameters={"evaluation.contenders": listed}))
    assert "evaluation.contenders.0.adapter: /elsewhere/adapter" in said
    assert "evaluation.contenders.1.model: ../../../model" in said
    assert "Add --trust" not in said


@pytest.mark.parametrize(("key", "value"), OUTSIDE.items())
def test_a_path_outside_is_listed_and_refused_unless_it_is_a_record_of_a_run_here(project, stranger, key, value):
    folder = stranger("elsewhere", parameters={key: value})
    said = refused(project, folder)
    assert f"{key}: {value}" in said
    assert "Add --allow-path" in said
    check(project, folder, paths=(Path("/elsewhere"), project / "../../../base", Path.home()))
    check(project, stranger(parameters={key: value}))


def test_a_source_outside_is_listed_in_the_catalog_too(project, stranger):
    entry = {"type": "qwen_vl_lora.datasets.sources.CaptionsFileDataset", "filepath": "/elsewhere/x.csv"}
    said = refused(project, stranger("elsewhere", catalog={"captioned_images": entry}))
    assert "catalog captioned_images.filepath: /elsewhere/x.csv" in said
    home = {**entry, "filepath": "data/x/~/.ssh/id"}
    said = refused(project, stranger("elsewhere", catalog={"captioned_images": home}))
    assert "captioned_images.filepath: data/x/~/.ssh/id" in said


def sealed(project, folder, by=None):
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.yml")}
    (folder / SEAL_FILE).write_text(seal_of(by or project, files))
    return folder


def test_a_record_that_this_project_sealed_needs_no_word_until_it_is_changed(project, stranger):
    folder = sealed(project, stranger(parameters={"image.allow_urls": True}))
    check(project, folder)
    change(folder / "conf/base/parameters.yml", {"image.url_hosts": ["evil.example"]})
    assert "evil.example" in refused(project, folder)


def test_a_seal_of_another_project_counts_for_nothing(project, stranger, tmp_path_factory):
    theirs = tmp_path_factory.mktemp("theirs")
    folder = sealed(project, stranger(parameters={"image.allow_urls": True}), by=theirs)
    assert "image.allow_urls" in refused(project, folder)
    seal_of(project, {})  # the project has a key of its own now
    assert "image.allow_urls" in refused(project, folder)


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("${}\\:."), max_size=12)
TREES = st.recursive(
    TEXTS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from("xyz"), TREES, max_size=3))
@example({"x": "costs ${5}"})
@example({"x": "\\${globals:recipe}"})
@example({"x": "\\\\${oc.env:HOME}"})
@example({"x": "${"})
def test_any_text_is_stored_as_text_and_reads_back_the_same(tmp_path, tree):
    file = tmp_path / "parameters.yml"
    file.write_text(stored_configuration({}, tree, {}, {})["conf/base/parameters.yml"], encoding="utf-8")
    assert json.dumps(read_values(file)) == json.dumps(tree)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TREES, st.sampled_from(["${oc.env:HOME}", "x${globals:a}", "\\\\${a}", "${a.b}", "${${a}}"]), st.integers(0, 20))
def test_an_interpolation_is_found_at_any_depth(tmp_path, tree, text, at):
    file = tmp_path / "x.yml"
    places = [path for path, _ in leaves(without_interpolations({"r": tree}))]
    planted = {"r": plant(without_interpolations(tree), places[at % len(places)][1:], text)}
    file.write_text(yaml.safe_dump(planted, allow_unicode=True), encoding="utf-8")
    with pytest.raises(ParameterError, match="interpolation"):
        read_values(file)


def plant(tree, path, text):
    if not path:
        return text
    if isinstance(tree, dict):
        return {**tree, path[0]: plant(tree[path[0]], path[1:], text)}
    return [plant(part, path[1:], text) if number == path[0] else part for number, part in enumerate(tree)]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["..", ".", "a", "link", "~", "", "data", "\0"]), max_size=6).map("/".join))
def test_no_path_that_leads_outside_is_taken_for_one_inside(tmp_path, path):
    link = tmp_path / "project/link"
    if not link.is_symlink():
        (tmp_path / "project/a").mkdir(parents=True)
        link.symlink_to(tmp_path)
    if not outside_paths({"x": path}, tmp_path / "project", []):
        real = os.path.realpath(tmp_path / "project" / path)
        assert real.startswith(os.path.realpath(tmp_path / "project"))


def test_a_report_of_a_record_whose_environment_is_a_path_is_refused_unread(project, planted):
    run = planted.parents[1]
    artifact = {"version": RUN, "path": "x"}
    written = dict.fromkeys(("predictions", "caption_metrics", "caption_scores"), artifact)
    facts = {"format": 1, "id": RUN, "recipe": "tiny", "outcome": "finished", "pipelines": ["evaluation"]}
    facts |= {"env": f"../{planted.relative_to(project).as_posix()}", "datasets": {"read": {}, "written": written}}
    (run / "record.json").write_text(json.dumps(facts))
    for command in (["report", str(run)], ["verify", str(run)]):
        done = CliRunner().invoke(cli, command)
        assert isinstance(done.exception, DataFormatError)
        assert "env: " in str(done.exception)
    nothing_was_written(project)


def test_verify_reads_outside_the_project_for_a_record_from_elsewhere_only_where_allowed(project, tmp_path_factory):
    secret = tmp_path_factory.mktemp("home") / "secret"
    secret.write_text("x")
    elsewhere = tmp_path_factory.mktemp("theirs") / RUN
    elsewhere.mkdir()
    read = {"base_model": {"path": str(secret.parent), "sha256": "0", "files": {"secret": "0"}}}
    facts = {"format": 1, "id": RUN, "recipe": "tiny", "outcome": "finished", "configuration": "conf"}
    (elsewhere / "record.json").write_text(json.dumps({**facts, "datasets": {"read": read, "written": {}}}))
    done = CliRunner().invoke(cli, ["verify", str(elsewhere)])
    assert isinstance(done.exception, ParameterError)
    assert f"base_model: {secret.parent}" in str(done.exception)
    said = CliRunner().invoke(cli, ["verify", str(elsewhere), "--allow-path", str(secret.parent)]).output
    assert "secret has different bytes" in said
