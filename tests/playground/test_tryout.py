"""Base and adapters on one model write what each of them writes alone, and one request's fault stays its own."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
import shlex
import threading
import time
from pathlib import Path

import pytest

from evaluation.rows import table_of
from qwen_vl_lora.evaluation.inference import Captioner
from qwen_vl_lora.evaluation.metrics import score_predictions
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.playground.corrections import Corrections
from qwen_vl_lora.playground.tryout import Tryout, check_picture, in_words, read_held_out
from qwen_vl_lora.samples.places import open_place
from qwen_vl_lora.samples.records import RowError
from samples.pictures import PARAMETERS, jpeg
from tiny_adapters import LORA, save_adapter

QUESTION = "Describe this picture."


@pytest.fixture(scope="module")
def tryout(tmp_path_factory, base_path):
    """A random base with two adapters beside each other, and one that changes the base's weights."""
    folder = tmp_path_factory.mktemp("adapters")
    base = BaseModel("tiny", base_path("qwen2_vl"))
    strong = LORA.model_copy(update={"lora_alpha": 64, "init_lora_weights": False})
    kinds = {
        "one": strong,
        "two": strong.model_copy(update={"r": 4, "target_modules": ["q_proj", "v_proj"]}),
        "pissa": LORA.model_copy(update={"init_lora_weights": "pissa", "lora_alpha": 64}),
    }
    adapters = {name: save_adapter(folder / name, base, lora) for name, lora in kinds.items()}
    settings = validate_parameters({**PARAMETERS, "device": "cpu"})
    return Tryout(base, adapters, settings)


@pytest.fixture
def photo(tryout):
    return check_picture(jpeg(1, (90, 60)), "my photo.jpg", tryout.settings.image)


def written(tryout, name, picture, settings):
    *parts, last = tryout.caption(name, picture, settings)
    return [part.text for part in parts], last


def alone(tryout, name, picture, settings):
    """The caption of a captioner that has loaded nothing else."""
    adapter = None if name is None else tryout.adapters[name]
    return Captioner(tryout.base_model, adapter, settings).caption(picture.images, [picture.sha256], None)[0]


def test_captions_are_those_of_each_model_alone_whatever_was_asked_before(tryout, photo):
    settings = {name: tryout.trained(name) for name in ("one", "two", "pissa")}
    expected = {name: alone(tryout, name, photo, given) for name, given in settings.items()}
    expected[None] = alone(tryout, None, photo, settings["one"])
    assert len({caption.text for caption in expected.values()}) >= 3
    for name in ("one", None, "two", "one", "pissa", None, "two"):
        parts, last = written(tryout, name, photo, settings[name or "one"])
        assert last.caption == expected[name], name
        assert parts[-1].strip() == last.text, name
        assert len(parts) > 2
    assert len(tryout._models) == 2  # one shared, one of the adapter that changes its base


def test_a_drawn_caption_is_that_of_the_command_with_the_same_seed(tryout, photo):
    drawn = []
    for seed in (3, 4):
        sampling = {"temperature": 2.0, "seed": seed}
        settings = tryout.asked("one", QUESTION, "", {"inference": {"sampling": sampling}})
        adapter, asked = tryout.adapters["one"], settings.inference.sampling
        captioner = Captioner(tryout.base_model, adapter, settings, asked)
        _, last = written(tryout, "one", photo, settings)
        assert last.caption == captioner.caption(photo.images, [photo.sha256], None)[0]
        drawn.append(last.text)
    assert drawn[0] != drawn[1]


def test_switching_between_loaded_adapters_takes_less_than_a_second(tryout, photo):
    for name in ("one", "two"):
        written(tryout, name, photo, tryout.trained(name))
    began = time.thread_time()
    with tryout._active("one", tryout.trained("one")), tryout._lock:
        pass
    assert time.thread_time() - began < 1


def test_two_people_at_once_get_their_own_captions(tryout, photo):
    other = check_picture(jpeg(5, (60, 90)), "b.jpg", tryout.settings.image)
    asked = [("one", photo), ("two", other), (None, photo), ("one", other)]
    settings = {name: tryout.trained(name or "one") for name, _ in asked}
    expected = [written(tryout, name, picture, settings[name])[1] for name, picture in asked]
    found = {}

    def ask(place, name, picture):
        found[place] = written(tryout, name, picture, settings[name])[1]

    threads = [threading.Thread(target=ask, args=(place, *one)) for place, one in enumerate(asked)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[place] for place in range(len(asked))] == expected


def test_who_leaves_ends_the_generation_and_the_next_request_is_answered(tryout, photo):
    long = tryout.asked("one", QUESTION, "", {"generation": {"max_new_tokens": 100_000, "repetition_penalty": 1.0}})
    words = tryout.caption("one", photo, long)
    next(words)
    words.close()
    assert not tryout._lock.locked()
    assert written(tryout, "one", photo, tryout.trained("one"))[1].caption is not None


@contextlib.contextmanager
def memory_left(size):
    """This process gets `size` bytes more and no others."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def test_a_request_that_needs_too_much_memory_is_told_and_the_next_is_answered(tryout, photo):
    size = {"resized_height": 9000, "resized_width": 9000, "min_pixels": None, "max_pixels": None}
    huge = tryout.asked("one", QUESTION, "", {"image": size})
    with memory_left(200 * 2**20), pytest.raises(Exception, match=r"(?i)alloc|memory") as met:
        written(tryout, "one", photo, huge)
    assert "Out of main memory" in in_words(met.value)
    assert written(tryout, "one", photo, tryout.trained("one"))[1].caption is not None


@pytest.mark.parametrize(
    ("user", "given", "message"),
    [
        ("", {}, "The prompt '' is not valid"),
        (QUESTION, {"generation": {"max_new_tokens": 0}}, "max_new_tokens: Input should be greater than 0"),
        (QUESTION, {"image": {"resized_height": 56}}, "give resized_height and resized_width, or min_pixels"),
    ],
)
def test_wrong_settings_are_refused_in_words(tryout, user, given, message):
    with pytest.raises(ParameterError, match=message):
        tryout.asked("one", user, "", given)


def test_differences_from_the_training_are_told(tryout):
    assert tryout.differences("one", tryout.trained("one")) == []
    size = {"resized_height": 56, "resized_width": 84, "min_pixels": None, "max_pixels": None}
    given = {"image": size, "generation": {"max_new_tokens": 9}}
    asked = tryout.asked("one", "What is it?", "Be short.", given)
    assert tryout.differences("one", asked) == [
        "prompt: trained with 'Describe this picture.', now 'What is it?'",
        "prompt: trained with system text the chat template's own, now 'Be short.'",
        "picture size: trained with 3136 to 19600 pixels, now 56 x 84 px",
        "max_new_tokens: trained with 7, now 9",
    ]
    assert tryout.differences(None, tryout.settings) == []
    assert tryout.differences(None, tryout.asked(None, "What is it?", "", {})) == [
        f"prompt: configured {tryout.settings.prompt.user!r}, now 'What is it?'"
    ]


def test_the_command_says_what_differs_only(tryout, photo):
    assert tryout.command("one", photo, tryout.trained("one")) == "qwen-vl-lora caption 'my photo.jpg' --adapter one"
    asked = tryout.asked("one", "What's it?", "", {"generation": {"max_new_tokens": 9}})
    told = dataclasses.replace(tryout, params=["device=cpu"], base_options=["--env", "own"], base_params=["recipe=r"])
    assert shlex.split(told.command("one", photo, asked)) == [
        *("qwen-vl-lora", "caption", "my photo.jpg", "--adapter", "one"),
        *("--prompt", "What's it?", "--params", "device=cpu,generation.max_new_tokens=9"),
    ]
    base = shlex.split(told.command(None, photo, tryout.settings))
    assert base[3:] == ["--adapter", "none", "--env", "own", "--params", "device=cpu,recipe=r"]


@pytest.mark.parametrize("data", [b"", b"<html>not a picture</html>", jpeg(1)[:300]])
def test_a_bad_picture_gets_its_usual_reason(tryout, data):
    with pytest.raises(RowError) as met:
        check_picture(data, "a.jpg", tryout.settings.image)
    assert in_words(met.value).partition(":")[0] in ("empty_file", "not_an_image", "damaged_image")


def test_saved_captions_are_read_as_training_data(tryout, photo, tmp_path):
    corrections = Corrections(tmp_path)
    settings = tryout.asked("one", "What is it?", "Be short.", {})
    corrections.save_row(photo, "first", settings)
    corrections.save_row(photo, 'A "dog"\nruns — 犬', settings)
    rows = corrections.save_row(photo, "Another question.", tryout.trained("one"))
    (first, second) = open_place(str(rows))
    assert [(turn.role, turn.text) for turn in first.turns] == [
        ("system", "Be short."),
        ("user", "<image>What is it?"),
        ("assistant", 'A "dog"\nruns — 犬'),
    ]
    assert first.images[0].read_bytes() == photo.images.read_bytes(photo.sha256)
    assert second.turns[-1].text == "Another question."

    corrections.save_sidecar(photo, "first")
    text = corrections.save_sidecar(photo, "A dog\nruns.")
    (only,) = open_place(str(text.parent))
    assert (only.turns[-1].text, only.images[0].stem) == ("A dog runs.", text.stem)


@pytest.mark.parametrize("caption", ["", " \n", "a <|im_end|> b"])
def test_a_caption_that_cannot_be_trained_is_not_saved(tryout, photo, tmp_path, caption):
    with pytest.raises(RowError):
        Corrections(tmp_path).save_sidecar(photo, caption)
    with pytest.raises(RowError):
        Corrections(tmp_path).save_row(photo, caption, tryout.trained("one"))
    assert list(tmp_path.rglob("*.txt")) + list(tmp_path.rglob("*.jsonl")) == []


def test_held_out_pictures_come_worst_first(images):
    said = ["a red dog runs", "two blue cats", "one old tree", "many small birds sing"]
    tuned = [said[0], "nothing", "one old house", said[3]]
    table = table_of([([reference], "x", text) for reference, text in zip(said, tuned, strict=True)])
    table["image_path"] = [entry.path for entry in images]
    _, scores = score_predictions(table, validate_parameters(PARAMETERS).scoring)
    found = read_held_out(table, scores, images)
    assert [one.score for one in found] == sorted(scores["tuned_cider"])
    assert found[0].picture.sha256 == list(images)[1].sha256
    assert found[1].references == ("one old tree",)
    assert all(one.picture.is_held_out for one in found)
