"""An adapter is asked, token for token, what its samples asked in training."""

from __future__ import annotations

import json

import pytest

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.conversations import ask_about, build_conversations, parse_conversation
from qwen_vl_lora.samples.prompts import TrainedPrompt
from qwen_vl_lora.samples.sources import CaptionsFile
from samples.pictures import (
    captions_parameters,
    image_parameters,
    jpeg,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
    write,
)
from tiny_models import FAMILIES

PICTURE = "<|vision_start|>0.jpg<|vision_end|>"


def tutorial(question: str, system: str | None = None) -> str:
    turns = [("system", system)] if system else []
    turns += [("user", question), ("assistant", "A dog."), ("user", "Sure?"), ("assistant", "Yes.")]
    return json.dumps([{"id": "identity_1", "conversations": [{"from": r, "value": v} for r, v in turns]}])


SOURCES = {
    "picture behind the question": (tutorial(f"COCO Yes: {PICTURE}"), {}),
    "picture before the question": (tutorial(f"{PICTURE}\nCOCO Yes:"), {}),
    "picture inside the question": (tutorial(f"What is in {PICTURE} here?"), {}),
    "own system text": (tutorial(f"COCO Yes: {PICTURE}", "Be brief."), {"system": "Never said."}),
    "override": (tutorial(f"COCO Yes: {PICTURE}", "Be brief."), {"override": True, "user": "Describe."}),
    "override with system text": (
        tutorial(f"My: {PICTURE}"),
        {"override": True, "user": "Name.", "system": "Hi."},
    ),
    "captions": ("image_path,caption\n0.jpg,A dog.\n", {"user": "Describe this picture."}),
    "captions, picture inside": (
        "image_path,caption\n0.jpg,A dog.\n",
        {"user": "See <image>, say.", "system": "Hi."},
    ),
}


@pytest.mark.parametrize(
    ("family", "kind"),
    # A thinking template trains the last answer alone.
    [(family, kind) for family in FAMILIES for kind in SOURCES if family != "qwen3_5" or kind.startswith("captions")],
)
def test_the_recorded_prompt_gives_the_tokens_that_were_trained(base_path, tmp_path, family, kind):
    text, prompt = SOURCES[kind]
    write(tmp_path / "0.jpg", jpeg(0, (140, 84)))
    file = write(tmp_path / ("mine.json" if text.startswith("[") else "mine.csv"), text.encode())
    limits = image_parameters()
    collected = collect(
        CaptionsFile(file), workspace_folder(tmp_path), captions_parameters(), limits, quarantine_parameters(0.0)
    )
    records = build_conversations(collected.samples, collected.images, prompt_parameters(**prompt))
    processor = BaseModel("tiny", base_path(family)).load_processor()
    encoder = ChatEncoder(processor, limits, collected.images)
    trained = encoder.encode(parse_conversation(records[0]))

    record = TrainedPrompt.of_conversations(map(parse_conversation, records), override=False).to_record()
    chosen = TrainedPrompt.of_record(json.loads(json.dumps(record))).choose()
    (picture,) = collected.images
    asked = encoder.encode_prompt(ask_about(picture.path, chosen))
    assert asked.ids.tolist() == trained.ids[: trained.prompt_length].tolist()
