"""Token ids are the chat template's, and only answers are scored."""

import json

import pytest

from qwen_vl_lora.exceptions import BaseModelError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.samples.collection import collect
from qwen_vl_lora.samples.conversations import build_conversations, parse_conversation
from qwen_vl_lora.samples.sources import CaptionsFile
from samples.pictures import (
    captions_parameters,
    jpeg,
    prompt_parameters,
    quarantine_parameters,
    workspace_folder,
    write,
)
from samples.pictures import (
    image_parameters as source_image_parameters,
)
from tiny_models import captioned


@pytest.fixture
def encoder(processor, images, image_parameters):
    return ChatEncoder(processor, image_parameters, images)


def talk(*turns):
    return parse_conversation(
        {"id": "talk", "conversations": [{"from": role, "value": value} for role, value in turns]}
    )


def marker(entry):
    return f"<|vision_start|>{entry.path}<|vision_end|>"


def scored_text(processor, encoded):
    return processor.tokenizer.decode(encoded.ids[encoded.scored])


def test_ids_are_what_the_processor_makes_of_picture_and_text(encoder, processor, images):
    for entry in images:
        ours = encoder.encode(parse_conversation(captioned("a", entry.path, "big red circle")))
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this picture."}]},
            {"role": "assistant", "content": [{"type": "text", "text": "big red circle"}]},
        ]
        text = processor.apply_chat_template(messages, tokenize=False)
        picture = encoder.sizer.resize(images.open(entry.sha256))
        theirs = processor(text=[text], images=[picture], do_resize=False)["input_ids"][0]
        assert ours.ids.tolist() == list(theirs)


def test_only_the_caption_and_its_end_token_are_scored(encoder, processor, images):
    encoded = encoder.encode(parse_conversation(captioned("a", next(iter(images)).path, "big red circle")))
    assert scored_text(processor, encoded) == "big red circle<|im_end|>"


def test_every_answer_of_several_turns_is_scored(encoder, processor, images):
    first = next(iter(images))
    encoded = encoder.encode(
        talk(("user", marker(first) + "What is it?"), ("assistant", "a star"), ("user", "Big?"), ("assistant", "yes"))
    )
    assert scored_text(processor, encoded) == "a star<|im_end|>yes<|im_end|>"


def test_several_pictures_keep_their_order_and_token_counts(encoder, processor, images):
    one, two, *_ = images
    encoded = encoder.encode(talk(("user", f"{marker(two)} and {marker(one)}?"), ("assistant", "two")))
    assert encoded.images == (two.sha256, one.sha256)
    assert encoded.is_image.sum() == sum(down * across // 4 for _, down, across in encoded.grids)


def test_text_without_pictures_is_a_conversation_too(encoder, processor):
    encoded = encoder.encode(talk(("user", "Hello"), ("assistant", "Hi")))
    assert encoded.images == ()
    assert scored_text(processor, encoded) == "Hi<|im_end|>"


def test_a_system_turn_replaces_the_templates_own(encoder, processor):
    encoded = encoder.encode(talk(("system", "Be terse."), ("user", "Hello"), ("assistant", "Hi")))
    assert processor.tokenizer.decode(encoded.ids).startswith("<|im_start|>system\nBe terse.<|im_end|>\n")


def test_a_prompt_ends_where_the_answer_begins(encoder, processor, images):
    conversation = parse_conversation(captioned("a", next(iter(images)).path, "big red circle"))
    whole, prompt = encoder.encode(conversation), encoder.encode_prompt(conversation)
    assert prompt.ids.tolist() == whole.ids[: whole.prompt_length].tolist()
    assert not prompt.scored.any()


SYSTEM, FIRST, SECOND = "Be brief.", "Which differs, the first or the second?", "And in colour?"


@pytest.mark.parametrize(
    "record",
    [
        pytest.param(
            {
                "images": ["0.jpg", "1.jpg", "2.jpg"],
                "messages": [
                    {"role": "system", "content": SYSTEM},
                    {"role": "user", "content": f"<image><image>{FIRST}"},
                    {"role": "assistant", "content": "The second."},
                    {"role": "user", "content": f"<image>{SECOND}"},
                    {"role": "assistant", "content": "Yes."},
                ],
            },
            id="ms-swift",
        ),
        pytest.param(
            {
                "system": SYSTEM,
                "image": ["0.jpg", "1.jpg", "2.jpg"],
                "conversations": [
                    {"from": "human", "value": f"<image>\n<image>\n{FIRST}"},
                    {"from": "gpt", "value": "The second."},
                    {"from": "human", "value": f"<image>\n{SECOND}"},
                    {"from": "gpt", "value": "Yes."},
                ],
            },
            id="LLaVA",
        ),
        pytest.param(
            {
                "conversations": [
                    {"from": "system", "value": SYSTEM},
                    {
                        "from": "user",
                        "value": f"{FIRST} <|vision_start|>0.jpg<|vision_end|> <|vision_start|>1.jpg<|vision_end|>",
                    },
                    {"from": "assistant", "value": "The second."},
                    {"from": "user", "value": f"{SECOND} <|vision_start|>2.jpg<|vision_end|>"},
                    {"from": "assistant", "value": "Yes."},
                ]
            },
            id="tutorials",
        ),
        pytest.param(
            {
                "messages": [
                    {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "0.jpg"}},
                            {"type": "image_url", "image_url": {"url": "1.jpg"}},
                            {"type": "text", "text": FIRST},
                        ],
                    },
                    {"role": "assistant", "content": "The second."},
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": "2.jpg"}},
                            {"type": "text", "text": SECOND},
                        ],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
                ]
            },
            id="OpenAI",
        ),
    ],
)
def test_system_text_turns_and_pictures_of_a_users_record_reach_training_and_evaluation(
    processor, image_parameters, tmp_path, record
):
    for number in range(3):
        write(tmp_path / f"{number}.jpg", jpeg(number))
    file = write(tmp_path / "mine.jsonl", json.dumps(record).encode())
    collected = collect(
        CaptionsFile(file),
        workspace_folder(tmp_path),
        captions_parameters(),
        source_image_parameters(),
        quarantine_parameters(0.0),
    )
    (written,) = build_conversations(collected.samples, collected.images, prompt_parameters())
    encoder = ChatEncoder(processor, image_parameters, collected.images)
    whole = encoder.encode(parse_conversation(written))
    asked = encoder.encode_prompt(parse_conversation(written))

    picture = {"type": "image"}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
        {"role": "user", "content": [picture, picture, {"type": "text", "text": FIRST}]},
        {"role": "assistant", "content": [{"type": "text", "text": "The second."}]},
        {"role": "user", "content": [picture, {"type": "text", "text": SECOND}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]

    def without_repeats(ids) -> list[int]:
        image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
        return [token for place, token in enumerate(ids) if token != image or ids[place - 1] != image]

    def template(turns, **options) -> list[int]:
        text = processor.apply_chat_template(turns, tokenize=False, **options)
        return processor.tokenizer(text)["input_ids"]

    assert without_repeats(whole.ids.tolist()) == template(messages)
    assert without_repeats(asked.ids.tolist()) == template(messages[:-1], add_generation_prompt=True)
    assert scored_text(processor, whole) == "The second.<|im_end|>Yes.<|im_end|>"
    order = [entry.sha256 for entry in sorted(collected.images, key=lambda entry: entry.id)]
    assert list(whole.images) == list(asked.images) == order


@pytest.fixture
def talk_of_flags(tmp_path):
    """A talk as a file has it, whose first answer is context only; with the images of its collection."""
    turns = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "BAD ANSWER", "loss": False},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "A red disc."},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "LAST BAD ANSWER", "weight": 0},
    ]
    write(tmp_path / "a.jpg", jpeg())
    file = write(tmp_path / "c.json", json.dumps([{"images": ["a.jpg"], "messages": turns}]).encode())
    found = collect(
        CaptionsFile(file),
        workspace_folder(tmp_path),
        captions_parameters(),
        source_image_parameters(),
        quarantine_parameters(),
    )
    return build_conversations(found.samples, found.images, prompt_parameters()), found.images


def test_an_answer_that_the_data_marks_as_no_target_is_read_and_not_scored(talk_of_flags, processor, image_parameters):
    (record,), images = talk_of_flags
    encoder = ChatEncoder(processor, image_parameters, images)
    encoded = encoder.encode(parse_conversation(record))
    assert scored_text(processor, encoded) == "A red disc.<|im_end|>"
    assert "BAD ANSWER<|im_end|>" in processor.tokenizer.decode(encoded.ids)
    assert "LAST" not in processor.tokenizer.decode(encoded.ids)


def test_an_evaluation_asks_for_the_last_answer_that_is_scored(talk_of_flags, processor, image_parameters):
    (record,), images = talk_of_flags
    encoder = ChatEncoder(processor, image_parameters, images)
    conversation = parse_conversation(record)
    asked = processor.tokenizer.decode(encoder.encode_prompt(conversation).ids)
    assert asked.endswith("And now?<|im_end|>\n<|im_start|>assistant\n")
    assert conversation.turns[-1][1][0].text == "A red disc."


@pytest.fixture
def thinking(base_path, images, image_parameters):
    """The encoder of a base whose template thinks, and its processor."""
    processor = BaseModel("tiny", base_path("qwen3_5")).load_processor()
    return ChatEncoder(processor, image_parameters, images), processor


def test_a_thinking_template_is_asked_not_to_think_and_the_empty_block_is_not_scored(thinking, images):
    encoder, processor = thinking
    conversation = parse_conversation(captioned("a", next(iter(images)).path, "big red circle"))
    whole, prompt = encoder.encode(conversation), encoder.encode_prompt(conversation)
    assert processor.tokenizer.decode(prompt.ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert whole.ids[: whole.prompt_length].tolist() == prompt.ids.tolist()
    assert scored_text(processor, whole) == "big red circle<|im_end|>"


def test_a_thinking_template_trains_the_last_answer_as_it_is_asked_for(thinking):
    encoder, processor = thinking
    turns = [("user", "What?"), ("assistant", "a star"), ("user", "Big?"), ("assistant", "yes")]
    with pytest.raises(BaseModelError, match=r"Conversation 'talk'.*only the last answer.*\"loss\": false"):
        encoder.encode(talk(*turns))
    record = {"id": "talk", "conversations": [{"from": role, "value": value} for role, value in turns]}
    record["conversations"][1]["loss"] = False
    conversation = parse_conversation(record)
    whole = encoder.encode(conversation)
    assert scored_text(processor, whole) == "yes<|im_end|>"
    assert whole.ids[: whole.prompt_length].tolist() == encoder.encode_prompt(conversation).ids.tolist()
    assert processor.tokenizer.decode(whole.ids).count("<think>") == 1


def test_an_answer_with_thoughts_is_refused_while_thinking_is_off(thinking):
    encoder, _ = thinking
    with pytest.raises(BaseModelError, match="Conversation 'talk'.*Thinking is off.*remove <think> blocks"):
        encoder.encode(talk(("user", "What?"), ("assistant", "<think>\nHm.\n</think>\n\na star")))
