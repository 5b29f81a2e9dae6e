"""Captions in the forms of image trainers, each file whole, and read back as a source of training."""

import pytest
from pydantic import ValidationError

from qwen_vl_lora.evaluation.generation import Caption
from qwen_vl_lora.evaluation.outputs import Outputs
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.inference_parameters import OutputParameters
from qwen_vl_lora.samples.named_pictures import gather_pictures
from qwen_vl_lora.samples.places import open_place
from samples.pictures import image_parameters, jpeg, write

NAMES = ["a.jpg", "in/b.jpg", "in/deep/c.d.jpg", "été.jpg"]


@pytest.fixture
def album(tmp_path):
    for seed, name in enumerate(NAMES):
        write(tmp_path / "album" / name, jpeg(seed))
    return tmp_path / "album"


def named(place):
    return gather_pictures([place], image_parameters(), recursive=True)


def captions_of(gathered):
    """A caption of two lines for each picture, with its number."""
    return {sha256: Caption(f"A dog,\n  no. {number}.", False) for number, sha256 in enumerate(gathered.usable)}


def wrote(album, **settings):
    """Write the captions; the texts below the album by their names."""
    gathered = named(album)
    outputs = Outputs(OutputParameters(**settings), album, gathered.named)
    outputs.write(captions_of(gathered))
    return {file.relative_to(album).as_posix(): file.read_bytes() for file in album.rglob("*.txt")}


def read_back(place):
    """Picture's file name → caption, as training reads them."""
    return {row.images[0].name: row.turns[0].text for row in open_place(str(place))}


def test_a_text_of_one_line_lies_beside_each_picture_and_is_read_as_its_caption(album):
    texts = wrote(album, sidecars="beside", prefix="mydog, ", suffix=" --")
    assert texts == {
        "a.txt": b"mydog, A dog, no. 0. --\n",
        "in/b.txt": b"mydog, A dog, no. 1. --\n",
        "in/deep/c.d.txt": b"mydog, A dog, no. 2. --\n",
        "été.txt": b"mydog, A dog, no. 3. --\n",
    }
    assert read_back(album) == {
        name.rpartition("/")[2]: f"mydog, A dog, no. {number}. --" for number, name in enumerate(NAMES)
    }
    assert not [path for path in album.rglob("*") if path.name.startswith(".")]


def test_another_folder_gets_the_same_subfolders(album, tmp_path):
    assert wrote(album, sidecars=str(tmp_path / "texts")) == {}
    found = sorted(path.relative_to(tmp_path / "texts").as_posix() for path in (tmp_path / "texts").rglob("*.txt"))
    assert found == ["a.txt", "in/b.txt", "in/deep/c.d.txt", "été.txt"]


def test_what_lies_there_stays_and_its_picture_is_not_captioned(album, caplog):
    caplog.set_level("INFO")
    (album / "a.txt").write_text("mine")
    (album / "in" / "b.txt").symlink_to("nowhere")
    gathered = named(album)
    settings = OutputParameters(sidecars="beside")
    left_out = Outputs(settings, album, gathered.named).left_out({})
    assert set(left_out) == {(album / name).as_posix() for name in ("a.jpg", "in/b.jpg")}
    assert all(
        reason.startswith("has_sidecar: ") and "overwrite: true replaces it" in reason for reason in left_out.values()
    )
    known = captions_of(gathered)
    assert Outputs(settings, album, gathered.named).left_out(known) == {}  # written by a run that was killed
    Outputs(settings, album, gathered.named).write(known)
    assert (album / "a.txt").read_text() == "mine"
    assert (album / "in" / "b.txt").is_symlink()
    assert "2 sidecars written, 2 were there and stay." in caplog.messages
    replaced = wrote(album, sidecars="beside", overwrite=True)
    assert replaced["a.txt"] == b"A dog, no. 0.\n"
    assert replaced["in/b.txt"] == b"A dog, no. 1.\n"
    assert not (album / "in" / "nowhere").exists()


def test_a_picture_without_caption_and_a_second_one_of_a_name_get_no_text(tmp_path, caplog):
    write(tmp_path / "a.jpg", jpeg(1))
    write(tmp_path / "a.jpeg", jpeg(2))
    write(tmp_path / "b.jpg", jpeg(3))
    gathered = named(tmp_path)
    captions = captions_of(gathered)
    captions[gathered.usable[2]] = Caption("", False, "not_captioned: too dark")
    Outputs(OutputParameters(sidecars="beside"), tmp_path, gathered.named).write(captions)
    assert [path.name for path in tmp_path.glob("*.txt")] == ["a.txt"]
    assert any("would describe" in message for message in caplog.messages)


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_tables_are_read_as_a_source_of_training(album, form):
    gathered = named(album)
    file = album / f"captions.{form}"
    settings = OutputParameters(**{form: str(file)}, prefix="mydog, ")
    Outputs(settings, album, gathered.named).write(captions_of(gathered))
    assert read_back(file) == {
        name.rpartition("/")[2]: f"mydog, A dog, no. {number}." for number, name in enumerate(NAMES)
    }
    assert all(row.images[0].is_absolute() and row.images[0].is_file() for row in open_place(str(file)))
    with pytest.raises(ParameterError, match=rf"inference.output.{form}: .* exists. Name another file, or set"):
        Outputs(settings, album, gathered.named)
    Outputs(settings.model_copy(update={"overwrite": True}), album, gathered.named)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"jsonl": "captions.json"}, r"jsonl: expected a file that ends with .jsonl; got 'captions.json'"),
        ({"parquet": "captions"}, "expected a file that ends with .parquet"),
        ({"prefix": "a\nb"}, "expected one line without control characters"),
    ],
)
def test_what_cannot_be_written_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        OutputParameters(**settings)
