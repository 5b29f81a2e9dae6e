"""Batches write what single prompts write."""

import pytest
import torch

from qwen_vl_lora.features.encoding import encode_pictures
from qwen_vl_lora.features.inputs import PixelPictures, choose_pictures
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.modeling.base_model import BaseModel
from qwen_vl_lora.modeling.chat import ChatEncoder
from qwen_vl_lora.modeling.pictures import PictureSizer
from qwen_vl_lora.parameters import GenerationParameters
from qwen_vl_lora.samples.conversations import parse_conversation
from qwen_vl_lora.scoring.generation import write_captions
from tiny_models import FAMILIES, captioned

PROMPTS = ["Describe this picture.", "What?", "How many objects are there, and which of them is the biggest?"]


@pytest.fixture(params=FAMILIES)
def base(request, base_path):
    return BaseModel("tiny", base_path(request.param))


@pytest.fixture
def parts(base, images, image_parameters):
    """Processor, sizer and prompts of unequal length over pictures of unequal size, and one without a picture."""
    processor = base.load_processor()
    sizer = PictureSizer.for_processor(processor, image_parameters)
    encoder = ChatEncoder(processor, sizer, images)
    records = [captioned(f"{e.id}/{p}", e.path, "x", prompt) for e in images for p, prompt in enumerate(PROMPTS)]
    text_only = {
        "id": "text",
        "conversations": [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "x"}],
    }
    return processor, sizer, [encoder.encode_prompt(parse_conversation(record)) for record in [*records, text_only]]


def settings(batch_size, new_tokens=12):
    return GenerationParameters(max_new_tokens=new_tokens, repetition_penalty=1.0, batch_size=batch_size)


def test_batches_write_what_single_prompts_write(base, parts, images):
    processor, sizer, prompts = parts
    model = base.load_model("float32", "cpu")
    pictures = PixelPictures(images, processor, sizer)
    # Whatever token the first prompt writes third ends an answer: some stop early, others go on.
    alone = write_captions(model, processor, prompts[:1], pictures, settings(1), "")
    third = processor.tokenizer(alone[0], add_special_tokens=False)["input_ids"][2]
    model.generation_config.eos_token_id = [third, processor.tokenizer.eos_token_id]
    single = write_captions(model, processor, prompts, pictures, settings(1), "")
    batched = write_captions(model, processor, prompts, pictures, settings(5), "")
    assert batched == single
    assert len({len(caption) for caption in single}) > 1


def test_stored_features_write_what_pixels_write(base, parts, images, image_parameters, tmp_path):
    processor, sizer, prompts = parts
    store = FeatureStore(tmp_path / "store")
    cpu = torch.device("cpu")
    store.publish(encode_pictures(images, base, image_parameters, "float32", cpu, store, tmp_path / "staging"))
    model = base.load_model("float32", "cpu")
    written = [
        write_captions(
            model,
            processor,
            prompts,
            choose_pictures(vision, base, store, images, "float32", processor, sizer),
            settings(4),
            "",
        )
        for vision in ("frozen", "adapted")
    ]
    assert written[0] == written[1]


def test_a_base_that_samples_is_made_to_be_greedy(base, parts, images):
    processor, sizer, prompts = parts
    model = base.load_model("float32", "cpu")
    pictures = PixelPictures(images, processor, sizer)
    greedy = write_captions(model, processor, prompts[:3], pictures, settings(3), "")
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=1.5)
    assert write_captions(model, processor, prompts[:3], pictures, settings(3), "") == greedy
