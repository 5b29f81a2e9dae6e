"""A plan counts the tokens of a run without importing what a run imports."""

import subprocess
import sys
from pathlib import Path

from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.stand_in import processor_of_files

SHIPPED = Path(__file__).parents[2] / "data" / "06_models" / "tiny_qwen2_vl"
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe it, 一滴水 <|im_end|>"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "small blue  triangle\n"}]},
]


def test_the_files_of_a_base_give_the_tokens_of_its_own_processor():
    base = BaseModel(name="tiny", path=SHIPPED)
    theirs, ours = base.load_processor(), processor_of_files(SHIPPED, base.family)
    for messages in (MESSAGES, [{"role": "system", "content": [{"type": "text", "text": "Be short."}]}, *MESSAGES]):
        for asks in (True, False):
            given = {"tokenize": False, "add_generation_prompt": asks}
            text = theirs.apply_chat_template(messages, **given)
            assert ours.apply_chat_template(messages, **given) == text
            ids = [list(one) for one in theirs.tokenizer([text], add_special_tokens=False)["input_ids"]]
            assert ours.tokenizer([text], add_special_tokens=False)["input_ids"] == ids
    assert ours.tokenizer.eos_token == theirs.tokenizer.eos_token
    image = theirs.image_token
    assert ours.image_token == image
    assert ours.tokenizer.convert_tokens_to_ids(image) == theirs.tokenizer.convert_tokens_to_ids(image)
    assert ours.image_processor.patch_size == theirs.image_processor.patch_size


def test_files_of_another_form_are_left_to_transformers(tmp_path):
    assert processor_of_files(tmp_path, BaseModel(name="tiny", path=SHIPPED).family) is None


def test_a_processor_of_files_needs_neither_torch_nor_transformers():
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from qwen_vl_lora.model.families import FAMILIES\n"
        "from qwen_vl_lora.model.stand_in import processor_of_files\n"
        f"made = processor_of_files(Path({str(SHIPPED)!r}), FAMILIES[0])\n"
        "assert made.tokenizer(['a'], add_special_tokens=False)['input_ids']\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
