"""The tutorials' data scripts, written afresh: pictures saved again one by one, a CSV, then the JSON.

Kept apart from `tutorial`: nothing here needs torch, and importing it would hide the memory figure.
"""

from __future__ import annotations

import csv
import json
from typing import Any

import pandas as pd
from PIL import Image

from benchmarks.jobs import Job

PROGRESS_EVERY = 50
TEST_ROWS = 4


def engineer(job: Job) -> dict[str, Any]:
    """Source to train and test JSON, as the tutorials' data2csv and csv2json do it."""
    table = save_pictures(job)
    table_to_json(job)
    return {"images": len(table)}


def save_pictures(job: Job) -> pd.DataFrame:
    """Tutorial step "data2csv": open each picture, save it again as JPEG, collect paths and captions.

    Differs: rows come from a CSV and files instead of MsDataset, whose rows are the same lazily
    decoded PIL pictures. Saving decodes: so every picture is decoded once, as on the other side.
    """
    folder = job.scratch / "coco_2014_caption"
    folder.mkdir()
    paths, captions = [], []
    with (job.data / "captions.csv").open(encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines)):
            path = folder / f"{row['image_id']}.jpg"
            if not path.exists():
                Image.open(job.data / row["image_path"]).convert("RGB").save(path)
            paths.append(str(path))
            captions.append(row["caption"])
            if number % PROGRESS_EVERY == 0:
                print(f"Processing {number + 1} images")
    table = pd.DataFrame({"image_path": paths, "caption": captions})
    table.to_csv(job.scratch / "coco-2024-dataset.csv", index=False)
    return table


def table_to_json(job: Job) -> None:
    """Tutorial step "csv2json", and the split by the last rows that the training script makes of it."""
    table = pd.read_csv(job.scratch / "coco-2024-dataset.csv")
    conversations = []
    for number in range(len(table)):
        question = f"COCO Yes: <|vision_start|>{table.iloc[number]['image_path']}<|vision_end|>"
        turns = [
            {"from": "user", "value": question},
            {"from": "assistant", "value": table.iloc[number]["caption"]},
        ]
        conversations.append({"id": f"identity_{number + 1}", "conversations": turns})
    parts = {"data_vl": conversations, "train": conversations[:-TEST_ROWS], "test": conversations[-TEST_ROWS:]}
    for name, records in parts.items():
        text = json.dumps(records, ensure_ascii=False, indent=2)
        (job.scratch / f"{name}.json").write_text(text, encoding="utf-8")
