"""Pictures are checked by any number of processes with the same result, and decoded once although a run was killed."""

import os
import signal
from pathlib import Path

import pytest

from cluster.processes import living, marked, wait_until
from cluster.works import cluster
from qwen_vl_lora.parameters import ONE_PROCESS
from qwen_vl_lora.runs import run as runs
from qwen_vl_lora.samples import checked_pictures, collection, image_stage
from qwen_vl_lora.samples.collection import PictureChecker, collect
from qwen_vl_lora.samples.image_stage import DataFolders
from qwen_vl_lora.samples.records import Rejection, SourceSample, Turn
from qwen_vl_lora.samples.source import GivenRows
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    png,
    quarantine_parameters,
    workspace_folder,
    write,
)


def rows_in(folder):
    """Files and bytes, some twice, some damaged, and rows that no picture decides."""
    files = [write(folder / f"{number}.jpg", jpeg(number)) for number in range(9)]
    write(folder / "half.png", png(50)[:-40])
    images = [*files, files[2], jpeg(3), folder / "half.png", folder / "none.jpg", png(60), b"text", files[0]]
    rows = [
        SourceSample(row, f"picture {row}", (image,), (Turn("assistant", f"Caption {row}."),), id_is_given=row % 2 == 0)
        for row, image in enumerate(images, 1)
    ]
    rows.insert(4, Rejection(99, "", "malformed_row", "not a row"))
    rows.append(SourceSample(20, "empty", (files[1],), (Turn("assistant", " "),)))
    rows.append(SourceSample(21, "picture 2", (files[5],), (Turn("assistant", "Another picture, the same id."),)))
    return rows


def collect_in(project, processes, rows, **image):
    how = ONE_PROCESS if processes == 1 else cluster(processes=processes)
    parameters = captions_parameters(), image_parameters(**image), quarantine_parameters(1.0)
    return collect(GivenRows(rows), workspace_folder(project), *parameters, cluster=how)


def told(collected):
    """All of a collection, without the folder that it lies in."""
    return {
        "images": [entry._replace(source=Path(entry.source).name, modified=0) for entry in collected.images.entries],
        "looks": collected.images.looks.tolist(),
        "samples": list(collected.samples),
        "table": collected.caption_table.frame().to_dict("records"),
        "rejected": collected.rejected_samples.drop(columns="detail").to_dict("records"),
        "shown": collected.rejected_pictures,
        "summary": collected.summary,
    }


def staged(project):
    folder = DataFolders.of(workspace_folder(project)).stage
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.setattr(collection, "PIECE_ROWS", 3)
    with marked() as mark:
        yield
    assert wait_until(lambda: not living(mark), 10), living(mark)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_find_what_one_finds(tmp_path, pieces, processes, caplog):
    caplog.set_level("INFO")
    rows = rows_in(tmp_path)
    one = collect_in(tmp_path / "one", 1, rows, allowed_roots=[str(tmp_path)])
    several = collect_in(tmp_path / "several", processes, rows, allowed_roots=[str(tmp_path)])
    assert told(several) == told(one)
    assert staged(tmp_path / "several") == staged(tmp_path / "one")
    assert len(one.images.entries) > 10
    assert len(one.rejected_samples) == 6
    assert "PictureChecker: 7 pieces in" in caplog.text


class DyingChecker(PictureChecker):
    """Is killed once, when it comes to the sixth row."""

    def __call__(self, rows):
        mark = Path("died")
        if any(row.row == 6 for row in rows if isinstance(row, SourceSample)) and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(rows)


@pytest.mark.slow
def test_the_share_of_a_killed_process_is_checked_by_the_others(tmp_path, pieces, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    rows = rows_in(tmp_path)
    one = collect_in(tmp_path / "one", 1, rows, allowed_roots=[str(tmp_path)])
    monkeypatch.setattr(collection, "PictureChecker", DyingChecker)
    several = collect_in(tmp_path / "several", 2, rows, allowed_roots=[str(tmp_path)])
    assert (tmp_path / "died").exists()
    assert "A process was killed. Its share is repeated" in caplog.text
    assert told(several) == told(one)


def test_pictures_that_are_referred_to_are_those_of_their_first_row(tmp_path, pieces):
    first, copy = (write(tmp_path / name, jpeg(1)) for name in ("first.jpg", "copy.jpg"))
    others = [write(tmp_path / f"{number}.jpg", jpeg(number)) for number in range(2, 5)]
    files = [first, *others, copy]
    rows = [
        SourceSample(row, str(file), (file,), (Turn("assistant", "x"),), id_is_given=False)
        for row, file in enumerate(files, 1)
    ]
    collected = collect_in(tmp_path / "several", 2, rows, allowed_roots=[str(tmp_path)], storage="reference")
    assert [Path(entry.source).name for entry in collected.images.entries] == [
        "first.jpg",
        "2.jpg",
        "3.jpg",
        "4.jpg",
        "first.jpg",
    ]
    assert staged(tmp_path / "several") == {}


def test_a_killed_run_decodes_no_picture_twice(tmp_path, monkeypatch):
    decoded = []
    inspect = image_stage.inspect_image

    def note(data, limits):
        decoded.append(data)
        return inspect(data, limits)

    monkeypatch.setattr(image_stage, "inspect_image", note)
    monkeypatch.setattr(checked_pictures, "_SHARD_PICTURES", 2)
    monkeypatch.setattr(collection, "_num_threads", lambda: 1)
    rows = [SourceSample(row, f"picture {row}", (jpeg(row),), (Turn("assistant", "x"),)) for row in range(1, 13)]

    def broken():
        yield from rows[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_in(tmp_path, 1, broken())
    before = len(decoded)
    assert before >= 4
    runs.begin_run("second")
    collected = collect_in(tmp_path, 1, rows)
    assert len(decoded) - before == len(rows) - before // 2 * 2  # shards of two were kept
    folder = DataFolders.of(workspace_folder(tmp_path)).stage / checked_pictures.FOLDER
    assert list(folder.glob("*/*.json"))
    runs.end_run(finished=True)
    assert not folder.exists()
    assert told(collected) == told(collect_in(tmp_path / "whole", 1, rows))


def test_damaged_facts_and_those_of_other_limits_are_not_used(tmp_path):
    stage = tmp_path / "stage"
    checked = checked_pictures.CheckedPictures(stage, image_parameters())
    facts = image_stage.inspect_image(jpeg(1), image_parameters())
    checked.add("a" * 64, facts)
    checked.save()
    assert checked_pictures.CheckedPictures(stage, image_parameters()).get("a" * 64) == facts
    assert checked_pictures.CheckedPictures(stage, image_parameters(max_aspect_ratio=2)).get("a" * 64) is None
    (shard,) = stage.glob("*/*/*.json")
    shard.write_text(shard.read_text()[:-5])
    assert checked_pictures.CheckedPictures(stage, image_parameters()).get("a" * 64) is None
