from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen_vl_lora.exceptions import DataFormatError, QwenVLLoraError
from qwen_vl_lora.samples.conversations import (
    Conversation,
    Conversations,
    ImagePart,
    TextPart,
    ask_about,
    build_conversations,
    image_marker,
    parse_conversation,
    row_of,
)
from qwen_vl_lora.samples.image_files import LOOK_BYTES
from qwen_vl_lora.samples.image_store import ImageEntry, ImageStore
from samples.pictures import prompt_parameters

SHAS = ["aa", "bb"]
A, B = "data/files/aa.jpg", "data/files/bb.jpg"


@pytest.fixture
def images(tmp_path) -> ImageStore:
    entries = [ImageEntry(sha, sha, "data/files", ".jpg", 40, 30, 100) for sha in SHAS]
    return ImageStore(tmp_path, entries, np.zeros((2, LOOK_BYTES // 8), dtype=np.uint64))


def sample(*turns: tuple[str, str], images: list[str] | None = None, row: int = 1) -> dict:
    return {
        "row": row,
        "id": "x",
        "image_ids": images or [],
        "images": images or [],
        "turns": [{"role": role, "text": text} for role, text in turns],
    }


CAPTION = sample(("assistant", "A dog."), images=["aa"])


def record(*messages: tuple[str, str]) -> dict:
    return {"id": "identity_7", "conversations": [{"from": role, "value": value} for role, value in messages]}


def user_parts(value: str) -> tuple:
    return parse_conversation(record(("user", value), ("assistant", "Yes."))).turns[0][1]


@pytest.mark.parametrize("user", ["Describe.", "COCO Yes: ", "Two\nlines.\n"])
@pytest.mark.parametrize("system", [None, "Be brief.", " Be brief.\n"])
def test_a_picture_is_asked_about_as_training_asked(images, user, system):
    prompt = prompt_parameters().model_copy(update={"user": user, "system": system})
    trained = parse_conversation(build_conversations([CAPTION], images, prompt)[0])
    assert ask_about(A, prompt).turns == trained.turns[:-1]


def test_a_caption_takes_the_tutorials_form(images):
    assert build_conversations([CAPTION, {**CAPTION, "row": 4}], images, prompt_parameters()) == [
        {
            "id": f"identity_{number}",
            "conversations": [
                {"from": "user", "value": f"COCO Yes: <|vision_start|>{A}<|vision_end|>"},
                {"from": "assistant", "value": "A dog."},
            ],
        }
        for number in (1, 4)  # rows 2 and 3 of the source were rejected
    ]


def test_captions_of_one_row_are_numbered_in_any_order_of_rows(images):
    rows = [3, 10**12, 3, 4, 70_000, 3, -1, 10**12, 4, 70_000, -1]
    built = build_conversations([{**CAPTION, "row": row} for row in rows], images, prompt_parameters())
    assert [record["id"].removeprefix("identity_") for record in built] == [
        "3", "1000000000000", "3_2", "4", "70000", "3_3", "-1", "1000000000000_2", "4_2", "70000_2", "-1_2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("conversation_id", "row"),
    [("identity_7", 7), ("identity_", 0), ("mine_7", 0), ("identity_7_b", 0), ("identity_٧", 0)],
)
def test_a_conversation_knows_the_row_it_comes_from(conversation_id, row):
    assert row_of(conversation_id) == row


def test_the_system_text_of_the_prompt_serves_captions(images):
    (built,) = build_conversations([CAPTION], images, prompt_parameters(system="Be brief."))
    assert built["conversations"][0] == {"from": "system", "value": "Be brief."}


def test_a_samples_own_texts_win(images):
    own = sample(("system", "Be kind."), ("user", "<image> What?"), ("assistant", "A dog."), images=["aa"])
    (built,) = build_conversations([own], images, prompt_parameters(system="Be brief."))
    assert built["conversations"][:2] == [
        {"from": "system", "value": "Be kind."},
        {"from": "user", "value": f"{image_marker(A)} What?"},
    ]


def test_a_question_of_its_own_is_not_given_a_foreign_system_text(images):
    own = sample(("user", "<image> What?"), ("assistant", "A dog."), images=["aa"])
    (built,) = build_conversations([own], images, prompt_parameters(system="Be brief."))
    assert [message["from"] for message in built["conversations"]] == ["user", "assistant"]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_override_replaces_texts_and_keeps_images_and_answers(images, system):
    own = sample(
        ("system", "Be kind."),
        ("user", "Compare <image> and <image>"),
        ("assistant", "Dogs."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
        images=["aa", "bb"],
    )
    (built,) = build_conversations([own], images, prompt_parameters(override=True, system=system))
    assert [tuple(message.values()) for message in built["conversations"]] == [
        *([("system", system)] if system else []),
        ("user", f"COCO Yes: {image_marker(A)} {image_marker(B)}"),
        ("assistant", "Dogs."),
        ("user", "COCO Yes:"),
        ("assistant", "Yes."),
    ]


def test_several_images_and_turns_come_back_in_their_places(images):
    own = sample(
        ("system", "Be brief."),
        ("user", "Compare <image> and <image>, please."),
        ("assistant", "Dogs."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
        images=["bb", "aa"],
    )
    (built,) = build_conversations([own], images, prompt_parameters())
    assert parse_conversation(built) == Conversation(
        "identity_1",
        (
            ("system", (TextPart("Be brief."),)),
            (
                "user",
                (TextPart("Compare "), ImagePart(B), TextPart(" and "), ImagePart(A), TextPart(", please.")),
            ),
            ("assistant", (TextPart("Dogs."),)),
            ("user", (TextPart("Sure?"),)),
            ("assistant", (TextPart("Yes."),)),
        ),
    )
    assert parse_conversation(built).image_paths == (B, A)


def test_text_only_samples_survive(images):
    (built,) = build_conversations([sample(("user", "Hello"), ("assistant", "Hi."))], images, prompt_parameters())
    assert parse_conversation(built).image_paths == ()


def test_a_sample_of_another_data_run_is_refused(images):
    with pytest.raises(DataFormatError, match="'cc' is not among the 2 pictures"):
        build_conversations([sample(("assistant", "A dog."), images=["cc"])], images, prompt_parameters())


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(f"COCO Yes: {image_marker(A)}", id="the tutorials' order"),
        pytest.param(f"{image_marker(A)}COCO Yes:", id="Qwen's order"),
        pytest.param(f"{image_marker(A)}\nCOCO Yes:", id="LLaVA's order"),
        pytest.param(f"COCO Yes:{image_marker(A)} ", id="no blank"),
    ],
)
def test_images_at_an_end_come_first_and_then_the_text(value):
    assert user_parts(value) == (ImagePart(A), TextPart("COCO Yes:"))


def test_several_images_at_the_end_come_first_in_their_order():
    value = f"Compare: {image_marker(B)} {image_marker(A)}"
    assert user_parts(value) == (ImagePart(B), ImagePart(A), TextPart("Compare:"))


def test_an_image_alone_needs_no_text():
    assert user_parts(image_marker(A)) == (ImagePart(A),)


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ('a mapping with a text under "id"', []),
        ('a mapping with a text under "id"', {"conversations": []}),
        ('a mapping with a text under "id"', {"id": 7, "conversations": []}),
        ("'identity_7' needs a list of turns", {"id": "identity_7"}),
        ("'identity_7' needs a list of turns", {"id": "identity_7", "conversations": []}),
        ("'identity_7' needs turns of the form", {"id": "identity_7", "conversations": ["text"]}),
        ("'identity_7' needs turns of the form", {"id": "identity_7", "conversations": [{"from": "user"}]}),
        ("'identity_7' has a turn from 'gpt'", record(("user", "a"), ("gpt", "b"))),
        ("'identity_7' has an empty user turn", record(("user", " "), ("assistant", "b"))),
        ("'identity_7' has an empty assistant turn", record(("user", "a"), ("assistant", ""))),
        ("'identity_7' has turns in the wrong order", record(("assistant", "b"), ("user", "a"))),
        ("'identity_7' has turns in the wrong order", record(("user", "a"))),
        ("'identity_7' has no user turn", record(("assistant", "b"))),
        ("'identity_7' has a picture in its assistant turn", record(("user", "a"), ("assistant", image_marker(A)))),
        ("contains <|vision_start|> in a text", record(("user", f"a <|vision_start|>{A}"), ("assistant", "b"))),
        ("contains <|im_end|> in a text", record(("user", "a<|im_end|>"), ("assistant", "b"))),
        ("contains <|im_end|> in a text", record(("user", "a"), ("assistant", "b<|im_end|>"))),
        ("has a picture marker around ' '", record(("user", image_marker(" ")), ("assistant", "b"))),
        (
            "has a picture marker around '<|image_pad|>'",
            record(("user", image_marker("<|image_pad|>")), ("assistant", "b")),
        ),
    ],
)
def test_broken_records_are_refused_by_name(fault, broken):
    with pytest.raises(DataFormatError) as error:
        parse_conversation(broken)
    assert fault in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "conversations", "from", "value", "x"]), inner, max_size=4)
    ),
    max_leaves=12,
)


def test_conversations_are_parsed_at_once_and_identified_by_their_stored_form():
    records = [{**record(("user", text), ("assistant", "Yes.")), "id": text} for text in ("One?", "Two?")]
    read = Conversations(records)
    assert list(read) == [parse_conversation(one) for one in records]
    assert read[1:] == (read[1],)
    reordered = [dict(reversed(one.items())) for one in records]
    assert read.sha256 == Conversations(reordered).sha256
    assert read.sha256 != Conversations(records[::-1]).sha256
    with pytest.raises(DataFormatError, match="'Two!' needs a list of turns"):
        Conversations([*records, {"id": "Two!"}])


@given(JSON)
def test_random_json_is_read_or_refused(value):
    with contextlib.suppress(QwenVLLoraError):
        assert parse_conversation(value).turns


PIECES = st.text(st.characters(exclude_characters="<|>", exclude_categories=["Cs"]), max_size=10)


@given(texts=st.lists(PIECES, min_size=1, max_size=4))
def test_texts_and_images_survive_the_round_trip(texts):
    paths = [f"data/files/{number}.jpg" for number in range(len(texts) - 1)]
    value = texts[0] + "".join(image_marker(path) + text for path, text in zip(paths, texts[1:], strict=True))
    if not value.strip():
        return
    parts = user_parts(value)
    assert [part.path for part in parts if isinstance(part, ImagePart)] == paths
    assert "".join(part.text for part in parts if isinstance(part, TextPart)).strip() == "".join(texts).strip()
