"""What is said of a source before a run reads its pictures."""

import os

from qwen_vl_lora.samples.sources import CaptionsFile
from qwen_vl_lora.session.preflight import check_files, report_copies
from samples.pictures import captions_parameters, quarantine_parameters


def bytes_of(folder, *names: str) -> int:
    (folder / "captions.csv").write_text("image_path,caption\n" + "".join(f"{name},A dog.\n" for name in names))
    return check_files(CaptionsFile(folder / "captions.csv"), captions_parameters(), quarantine_parameters())


def test_copies_of_more_than_ten_gigabytes_are_announced_with_the_other_way(tmp_path, caplog):
    for name, size in {"small.jpg": 10**9, "large.jpg": 11 * 10**9}.items():
        with (tmp_path / name).open("wb") as sparse:
            os.truncate(sparse.fileno(), size)
    assert bytes_of(tmp_path, "small.jpg", "small.jpg", "missing.jpg") == 10**9
    report_copies(bytes_of(tmp_path, "small.jpg"), tmp_path)
    assert caplog.records == []
    report_copies(bytes_of(tmp_path, "small.jpg", "large.jpg", "large.jpg"), tmp_path)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "have 12.0 GB, and image.storage: copy stores them once more" in said
    assert "image.storage=reference leaves them where they are" in said
