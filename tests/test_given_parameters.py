"""`--params`: what was typed is what is meant."""

import click
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_vl_lora.cli import cli
from qwen_vl_lora.session.given_parameters import params_in_words
from qwen_vl_lora.settings import CONFIG_LOADER_CLASS


def params_of(text):
    return cli.commands["run"].make_context("run", ["--params", text]).params["params"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("Look: what is it?", "Look: what is it?"),
        ("photo #3 of 4", "photo #3 of 4"),
        ("#5", "#5"),
        ("${HOME} ${oc.env:HOME} ${", "${HOME} ${oc.env:HOME} ${"),
        ("a=b", "a=b"),
        ("[INST] Describe", "[INST] Describe"),
        ("*anchor", "*anchor"),
        ("!!python/object:os.system", "!!python/object:os.system"),
        ("what's this?", "what's this?"),
        ('"a" or "b"', '"a" or "b"'),
        ("'a, lora.r=3'", "a, lora.r=3"),
        ('"line\\nbreak"', "line\nbreak"),
        ("'yes'", "yes"),
        ("007", "007"),
        ("2024_01", "2024_01"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("cats, dogs", "cats, dogs"),
        ("描述这张图片", "描述这张图片"),
    ],
)
def test_a_text_is_the_text_that_was_typed(typed, meant):
    assert params_of(f"prompt.user={typed},lora.r=4") == {"prompt": {"user": meant}, "lora": {"r": 4}}


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("4", 4), ("-2", -2), ("1e-4", 1e-4), (".5", 0.5), ("true", True), ("no", False), ("null", None), ("", None)],
)
def test_numbers_and_words_are_read_as_in_parameters_yml(typed, meant):
    assert params_of(f"a={typed}") == {"a": meant}


def test_lists_and_mappings_hold_texts_and_numbers():
    given = params_of("a=[1, 'x,b=c', d.example, 007],b={c: 1e-4, d: [yes]}")
    assert given == {"a": [1, "x,b=c", "d.example", "007"], "b": {"c": 1e-4, "d": [True]}}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("a=[b: c: d]", "the value of a cannot be read as a YAML list or mapping"),
        ("a=[" + "[" * 3000 + "]" * 3000 + "]", "the value of a cannot be read"),
        ("a=[*b]", "the value of a cannot be read"),
        ("a=1,a.b=2", "a.b is given both as a value and as a group"),
        ("a.b=2,a=1", "a is given both as a value and as a group"),
        ("=3", "must be of the form key=value"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(typed, message):
    with pytest.raises(click.UsageError, match=message):
        params_of(typed)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`load(text)`: the text as parameter, in a list, and where the catalog takes it up."""
    conf = tmp_path_factory.mktemp("conf")
    for name in ("base", "local"):
        (conf / name).mkdir()
    (conf / "base/parameters.yml").write_text("prompt: {user: a}\nroots: [x]\n")
    (conf / "base/catalog.yml").write_text("x: {filepath: '${runtime_params:f, none}'}\n")

    def call(text):
        given = {"prompt": {"user": text}, "roots": [text], "f": text}
        options = {"env": "local", "base_env": "base", "default_run_env": "local"}
        soft = {"parameters": "soft", "globals": "soft"}
        loader = CONFIG_LOADER_CLASS(str(conf), runtime_params=given, merge_strategy=soft, **options)
        parameters = loader["parameters"]
        return parameters["prompt"]["user"], parameters["roots"][0], loader["catalog"]["x"]["filepath"]

    return call


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab\\${}:.,'\"[]() #=\n"), max_size=12))
def test_no_text_is_taken_for_a_template(load, text):
    assert load(text) == (text, text, text)


def test_templates_that_break_omegaconf_are_texts(load):
    for text in ("${", "${}", "a\\${b}", "${oc.env:HOME}", "${globals:recipe}", "${runtime_params:f}", "\\\\${x}\\"):
        assert load(text) == (text, text, text)


@pytest.mark.parametrize(
    "tree",
    [
        {"device": "cpu", "base_model": "hf:owner/name@main", "generation": {"max_new_tokens": 9}},
        {"prompt": {"user": 'What\'s "this", lora.r=3? ${HOME}', "system": None}, "captions_file": "a b/c.csv"},
        {"recipe": "007", "captions": {"exclude": "null", "num_rows": 3, "collapse_whitespace": True}},
        {"image": {"allowed_roots": ["/a b", "c,d"], "url_timeout": 1.5}},
    ],
)
def test_parameters_in_words_are_read_as_they_were(tree):
    assert params_of(",".join(params_in_words(tree))) == tree
