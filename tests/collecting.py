"""What the nodes of data_engineering make of sources. As a command: `collecting.py ORDERS`; prints a line for each."""

import json
import sys
from pathlib import Path

from kedro.io import AbstractDataset

from qwen_vl_lora.parameters import SplitParameters
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.conversations import build_conversations
from qwen_vl_lora.samples.splitting import split_conversations
from samples.pictures import (
    captions_parameters,
    image_parameters,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
)

for project, entry, captions, image in json.loads(sys.argv[1]):
    source = AbstractDataset.from_config("captioned_images", entry).load()
    collected = collect(
        source,
        workspace_folder(Path(project)),
        captions_parameters(**captions),
        image_parameters(**image),
        quarantine_parameters(1.0),
    )
    rejected = collected.rejected_samples.to_dict("records")
    conversations = build_conversations(collected.samples, collected.images, prompt_parameters())
    split = (
        split_conversations(
            conversations, collected.images, SplitParameters(test_images=1, validation_images=1, seed=1)
        )
        if len(collected.images) > 2
        else None
    )
    print("\n" + json.dumps([list(collected.samples), rejected, conversations, split]))
