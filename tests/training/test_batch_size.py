"""`auto` takes the largest batch that fits, once: a resumed run cuts its steps as the first one did."""

import pytest

from qwen_vl_lora.exceptions import DeviceError
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.samples.conversations import Conversations
from qwen_vl_lora.training import batch_size
from qwen_vl_lora.training.batch_size import choose_batch_size
from qwen_vl_lora.training.collator import RowCollator
from tiny_models import captioned


@pytest.fixture
def choose(base_path, images, image_parameters, tmp_path, monkeypatch):
    """`choose(free_mb)`: the size for steps of four captions on a machine with so much memory."""
    base = BaseModel("tiny", base_path("qwen2_vl"))
    encoder = ChatEncoder(base.load_processor(), image_parameters, images)
    records = [captioned(f"identity_{number}", entry.path, "a star") for number, entry in enumerate(images, 1)]
    conversations = [encoder.encode(conversation) for conversation in Conversations(records)]
    collator = RowCollator(encoder, encoder.pixels)
    model = base.load_model("float32", "cpu").requires_grad_()

    def go(free_mb):
        monkeypatch.setattr(batch_size, "_free_bytes", lambda device: int(free_mb * 2**20))
        return choose_batch_size(model, conversations, collator, "separate", 4, tmp_path)

    return go


def test_the_first_choice_is_kept_whatever_is_free_later(choose):
    first = choose(free_mb=1e6)
    assert first == 4
    assert choose(free_mb=0.001) == 4


def test_less_memory_means_a_smaller_batch_and_the_choice_is_kept_too(choose, tmp_path):
    sizes = []
    for free_mb in (64, 32, 16, 8, 4, 2):
        sizes.append(choose(free_mb))
        (tmp_path / batch_size.CHOICE_FILE).unlink()
        if sizes[-1] < 4:
            break
    assert sizes[-1] in (1, 2)


def test_no_memory_for_one_caption_says_what_to_lower(choose):
    with pytest.raises(DeviceError, match="One caption of .* tokens does not fit in memory"):
        choose(free_mb=0.001)


def test_the_choice_appears_whole(choose, tmp_path, monkeypatch):
    def die(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batch_size, "write_whole", die)
        choose(free_mb=1e6)
    assert not (tmp_path / batch_size.CHOICE_FILE).exists()
    assert choose(free_mb=1e6) == 4
