"""Batches write what single prompts write."""

import itertools

import pytest
import torch

from qwen_vl_lora.evaluation.generation import write_batch, write_captions, write_each
from qwen_vl_lora.features.encoding import encode_pictures
from qwen_vl_lora.features.inputs import choose_pictures
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.inference_parameters import SamplingParameters
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.parameters import GenerationParameters
from qwen_vl_lora.samples.conversations import Conversations
from tiny_models import FAMILIES, captioned

PROMPTS = ["Describe this picture.", "What?", "How many objects are there, and which of them is the biggest?"]


@pytest.fixture(params=FAMILIES)
def base(request, base_path):
    return BaseModel("tiny", base_path(request.param))


@pytest.fixture
def parts(base, images, image_parameters):
    """Encoder and prompts of unequal length over pictures of unequal size, and one without a picture."""
    encoder = ChatEncoder(base.load_processor(), image_parameters, images)
    records = [captioned(f"{e.id}/{p}", e.path, "x", prompt) for e in images for p, prompt in enumerate(PROMPTS)]
    text_only = {
        "id": "text",
        "conversations": [{"from": "user", "value": "Hello"}, {"from": "assistant", "value": "x"}],
    }
    return encoder, [encoder.encode_prompt(conversation) for conversation in Conversations([*records, text_only])]


def settings(batch_size, new_tokens=12, penalty=1.0):
    return GenerationParameters(max_new_tokens=new_tokens, repetition_penalty=penalty, batch_size=batch_size)


def test_batches_write_what_single_prompts_write(base, parts, images):
    encoder, prompts = parts
    model = base.load_model("float32", "cpu")
    processor, pictures = encoder.processor, encoder.pixels
    # Whatever token is written third by the first prompt that writes so many ends an answer: some stop early.
    alone = [caption.text for caption in write_captions(model, processor, prompts, pictures, settings(1), "")]
    third = next(ids[2] for ids in processor.tokenizer(alone, add_special_tokens=False)["input_ids"] if len(ids) > 2)
    model.generation_config.eos_token_id = [third, processor.tokenizer.eos_token_id]
    for penalty in (1.0, 1.3):
        decoding = [settings(size, penalty=penalty) for size in (1, 5)]
        plain = [write_batch(model, processor, [prompt], pictures, decoding[0])[0] for prompt in prompts]
        single, batched = (write_captions(model, processor, prompts, pictures, one, "") for one in decoding)
        assert batched == single == plain
        assert len({len(caption.text) for caption in single}) > 1


def test_drawn_words_are_those_of_their_seed_and_leave_the_random_state(base, parts):
    encoder, prompts = parts
    model, given = (
        base.load_model("float32", "cpu"),
        (encoder.processor, prompts[:4], encoder.pixels, settings(2), None),
    )
    before = torch.get_rng_state()
    drawn = [
        [caption.text for caption in write_captions(model, *given, SamplingParameters(temperature=2.0, seed=seed))]
        for seed in (1, 1, 2)
    ]
    assert torch.equal(before, torch.get_rng_state())
    assert drawn[0] == drawn[1] != drawn[2]
    likeliest = [caption.text for caption in write_captions(model, *given)]
    cold = SamplingParameters(temperature=2.0, top_p=1e-6)
    assert [caption.text for caption in write_captions(model, *given, cold)] == likeliest


def test_prompts_are_taken_as_they_are_needed(base, parts):
    encoder, prompts = parts
    model, taken = base.load_model("float32", "cpu"), []

    def endless():
        for prompt in itertools.cycle(prompts):
            taken.append(prompt)
            yield prompt

    written = write_each(model, encoder.processor, endless(), encoder.pixels, settings(2, 4))
    some = dict(itertools.islice(written, len(prompts)))
    written.close()
    assert len(taken) < 4 * len(prompts)
    alone = write_captions(model, encoder.processor, prompts, encoder.pixels, settings(1, 4), None)
    assert some == {number: alone[number % len(prompts)] for number in some}


class Says:
    """A model that continues every prompt with given tokens."""

    device = torch.device("cpu")

    def __init__(self, base, continuations, ends):
        self.generation_config = base.load_model("float32", "cpu").generation_config
        self.generation_config.eos_token_id = ends
        self._continuations = torch.tensor(continuations)

    def eval(self):
        return self

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, self._continuations], dim=1)


def test_a_caption_is_cut_where_no_end_token_was_written(base, parts, images):
    encoder, prompts = parts
    tokenizer = encoder.processor.tokenizer
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    word = tokenizer("a", add_special_tokens=False)["input_ids"][0]
    rows = {
        (word, word, word): True,
        (word, word, end): False,  # an end that comes last
        (word, end, pad): False,
        (end, pad, pad): False,
    }
    pictures = encoder.pixels
    for ends in (None, end, [end, pad]):
        model = Says(base, list(rows), ends)
        same_length = [prompts[0]] * len(rows)
        written = write_batch(model, encoder.processor, same_length, pictures, settings(len(rows), 3))
        assert [caption.is_cut for caption in written] == list(rows.values())


def test_stored_features_write_what_pixels_write(base, parts, images, image_parameters, tmp_path):
    encoder, prompts = parts
    store = FeatureStore(tmp_path / "store")
    cpu = torch.device("cpu")
    store.publish(encode_pictures(images, base, image_parameters, "float32", cpu, store, tmp_path / "staging"))
    model = base.load_model("float32", "cpu")
    written = [
        write_captions(
            model,
            encoder.processor,
            prompts,
            choose_pictures(vision, base, encoder, store, "float32"),
            settings(4),
            "",
        )
        for vision in ("frozen", "adapted")
    ]
    assert written[0] == written[1]


def test_a_base_that_samples_is_made_to_be_greedy(base, parts, images):
    encoder, prompts = parts
    model = base.load_model("float32", "cpu")
    pictures = encoder.pixels
    greedy = write_captions(model, encoder.processor, prompts[:3], pictures, settings(3), "")
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, top_p=0.5, repetition_penalty=1.5)
    assert write_captions(model, encoder.processor, prompts[:3], pictures, settings(3), "") == greedy
