"""Tokenised samples are what the encoder gives, made once, and whole or absent."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from qwen_vl_lora.exceptions import DataFormatError
from qwen_vl_lora.model import chat
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.samples.conversations import Conversations
from qwen_vl_lora.samples.prompts import TrainedPrompt
from qwen_vl_lora.samples.record_files import open_records, write_records
from qwen_vl_lora.training.data import part_by_length
from qwen_vl_lora.training.rows import StepSampler, longest, share_groups
from qwen_vl_lora.training.tokenised import HEADER, tokenise
from tiny_models import captioned


def talk(identity, *turns):
    return {"id": identity, "conversations": [{"from": role, "value": value} for role, value in turns]}


@pytest.fixture
def records(images):
    """Captions of one picture with two questions, two pictures side by side, a late picture, and none."""
    one, two, three, _ = (entry.path for entry in images)
    marked = [f"<|vision_start|>{path}<|vision_end|>" for path in (one, two, three)]
    late = [
        ("user", f"{marked[0]} What?"),
        ("assistant", "A star."),
        ("user", f"{marked[1]} And?"),
        ("assistant", "No."),
    ]
    return [
        captioned("a", one, "a star"),
        talk("è", ("system", "Be brief."), ("user", f"{marked[1]}{marked[2]} Which?"), ("assistant", "the second")),
        captioned("b", two, "a long red bar " * 8),
        captioned("c", one, "a red star"),
        talk("late", *late),
        talk("late again", *late),
        talk("text", ("user", "Hello"), ("assistant", "Hi")),
        captioned("d", one, "a star", prompt="What is this?"),
        captioned("e", two, "a bar"),
    ]


@pytest.fixture
def make(base_path, images, image_parameters, records, tmp_path):
    """`make()`: the samples of `records`, which lie in a file; `encodes=False` fails if they have to be made."""
    base_model = BaseModel("tiny", base_path("qwen2_vl"))
    file = tmp_path / "train_conversations.json"
    write_records(records, file)

    def go(encodes=True, **changes):
        image = image_parameters.model_copy(update=changes)

        def encoder():
            assert encodes, "the samples were made again"
            return ChatEncoder(base_model.load_processor(), image, images)

        return tokenise(Conversations(open_records(file)), base_model, image.size, tmp_path / "tokenised", encoder)

    return go


@pytest.fixture
def encoded(base_path, images, image_parameters, records):
    encoder = ChatEncoder(BaseModel("tiny", base_path("qwen2_vl")).load_processor(), image_parameters, images)
    return [encoder.encode(conversation) for conversation in Conversations(records)]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(other):
            mine, given = getattr(one, field.name), getattr(other, field.name)
            if isinstance(given, np.ndarray):
                assert mine.dtype == given.dtype
                mine, given = mine.tolist(), given.tolist()
            assert mine == given, (other.id, field.name)


def test_a_sample_read_from_disk_is_the_one_that_was_encoded(make, encoded):
    samples = make()
    assert_equal(samples, encoded)
    assert_equal(samples[2:4], encoded[2:4])
    assert samples.lengths.tolist() == [len(item.ids) for item in encoded]
    assert_equal(pickle.loads(pickle.dumps(samples.choose(np.array([3, 0])))), [encoded[3], encoded[0]])


def test_samples_are_chosen_by_their_length_without_being_read(make, encoded, caplog):
    samples = make()
    most = max(len(item.ids) for item in encoded)
    kept, long = part_by_length(samples, most - 1, max_share=0.2)
    assert_equal(kept, [item for item in encoded if len(item.ids) < most])
    assert_equal(long, [item for item in encoded if len(item.ids) == most])
    assert f"'b' with {most}" in caplog.text
    assert_equal(longest(samples, 3), sorted(encoded, key=lambda item: len(item.ids), reverse=True)[:3])
    with pytest.raises(
        DataFormatError, match=f"1 of 9 conversations are longer than max_length {most - 1}.*nothing is"
    ):
        part_by_length(samples, most - 1, max_share=0.1)


def test_rows_are_shared_as_if_the_samples_were_in_memory(make, encoded):
    order = np.array([7, 3, 8, 0, 4, 2, 5, 1])
    samples, listed = make().choose(order), [encoded[place] for place in order]
    ours = StepSampler(share_groups(samples, "shared"), 2, seed=5)
    theirs = StepSampler(share_groups(listed, "shared"), 2, seed=5)
    assert [step.tolist() for step in ours.steps()] == [step.tolist() for step in theirs.steps()]
    groups = share_groups(samples, "shared").tolist()
    assert groups[1] == groups[3]
    assert len(set(groups)) == len(groups) - 2  # two pairs: a and c, b and e


def test_the_prompt_is_counted_in_the_order_of_the_samples(make, records):
    order = np.array([7, 3, 8, 0, 4, 2, 5, 1, 6])
    conversations = Conversations([records[place] for place in order])
    counted = TrainedPrompt.of_conversations(conversations, override=True)
    assert make().choose(order).prompt(override=True) == counted


def test_a_second_run_tokenises_nothing(make, encoded, records):
    first = make()
    again = make(encodes=False)
    assert_equal(again, encoded)
    assert again.sha256 == first.sha256 == Conversations(records).sha256


def test_another_picture_size_or_text_is_tokenised_again(make, records, tmp_path):
    before = make()
    assert sum(make(max_pixels=84 * 84).lengths) < sum(before.lengths)
    write_records([*records[:-1], captioned("e", "data/files/none.png", "x")], tmp_path / "train_conversations.json")
    with pytest.raises(AssertionError, match="made again"):
        make(encodes=False)


def test_a_damaged_file_is_made_again(make, encoded, tmp_path, caplog):
    make()
    (folder,) = (tmp_path / "tokenised").iterdir()
    for name in ("tokens", HEADER):
        data = bytearray((folder / name).read_bytes())
        data[7] ^= 1
        (folder / name).write_bytes(data)
        assert_equal(make(), encoded)
        assert "are damaged; they are made again" in caplog.text
        caplog.clear()
    (folder / "names").unlink()
    assert_equal(make(), encoded)


def test_an_interrupted_run_leaves_nothing(make, encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "_AT_ONCE", 2)
    segments = ChatEncoder._segments

    def die(self, conversation):
        if conversation.id == "c":
            raise KeyboardInterrupt
        return segments(self, conversation)

    with monkeypatch.context() as patch:
        patch.setattr(ChatEncoder, "_segments", die)
        with pytest.raises(KeyboardInterrupt):
            make()
    assert list((tmp_path / "tokenised").iterdir()) == []
    assert_equal(make(), encoded)


def test_a_conversation_without_a_scored_answer_is_named(make, records, tmp_path):
    mute = talk("mute", ("user", "Hello?"), ("assistant", "Hi"))
    mute["conversations"][1]["loss"] = False
    records.append(mute)
    write_records(records, tmp_path / "train_conversations.json")
    with pytest.raises(DataFormatError, match="1 of 10 conversations have no assistant turn.*the first is 'mute'"):
        make()


def test_the_header_names_the_file_of_the_conversations(make, tmp_path):
    import hashlib

    make()
    header = json.loads(next((tmp_path / "tokenised").glob(f"*/{HEADER}")).read_text())
    content = (tmp_path / "train_conversations.json").read_bytes()
    assert header["key"]["conversations"] == hashlib.sha256(content).hexdigest()
