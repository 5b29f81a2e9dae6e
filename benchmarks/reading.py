"""Reading of captions alone: CPU seconds and memory for a table of many rows, without its pictures.

python -m benchmarks.reading                 # 1,000,000 rows of CSV; at most 20 s of CPU are expected
python -m benchmarks.reading --rows 100000 --form jsonl
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from qwen_vl_lora.samples.places import open_place

LIMIT_SECONDS = 20.0
"""Of CPU, for a million rows of CSV; JSON is parsed record by record and takes about twice as long."""


def write_table(file: Path, form: str, num_rows: int) -> None:
    """Rows as COCO has them: a path in a folder, five captions of a picture, a dozen words."""
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(_lines(form, num_rows))


def _lines(form: str, num_rows: int) -> Iterator[str]:
    if form == "csv":
        yield "image_path,caption\n"
    for number in range(num_rows):
        path = f"train2014/COCO_train2014_{number // 5:012}.jpg"
        caption = f"A man in a red jacket, number {number}, rides a horse along the beach."
        if form == "csv":
            yield f'{path},"{caption}"\n'
        else:
            yield json.dumps({"image_path": path, "caption": caption}) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--form", choices=("csv", "jsonl"), default="csv")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"captions.{asked.form}"
        write_table(file, asked.form, asked.rows)
        started = time.process_time()
        num_samples = sum(1 for _ in open_place(str(file)))
        seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    allowed = LIMIT_SECONDS * asked.rows / 1_000_000 * (1 if asked.form == "csv" else 2)
    print(f"{num_samples} rows of {asked.form}: {seconds:.2f} s of CPU (at most {allowed:.1f}), peak {peak:.0f} MB")
    if num_samples != asked.rows or seconds > allowed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
