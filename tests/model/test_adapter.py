"""An adapter says what made it, fits what it was trained for, and is refused where it would silently do nothing."""

import pytest

from model.damage import edit_json, edit_weights
from qwen_vl_lora.exceptions import AdapterError, MissingArtifactError
from qwen_vl_lora.model.adapter import RECORD_FILE, WEIGHTS_FILE, Adapter, note_run
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import PromptParameters, validate_parameters
from qwen_vl_lora.samples.conversations import Conversations
from samples.pictures import PARAMETERS
from tiny_adapters import save_adapter
from tiny_models import captioned

PROMPT = PromptParameters(user="Describe this picture.", system=None, override=False)


@pytest.fixture
def base(base_path):
    return BaseModel("tiny", base_path("qwen2_vl"))


@pytest.fixture
def adapter(tmp_path, base, image_parameters):
    """As this project writes it: weights, configuration and record."""
    return save_adapter(tmp_path, base, image=image_parameters.model_dump())


@pytest.fixture
def settings(image_parameters):
    """Those of the adapter's training."""
    trained = {"prompt": PROMPT, "image": image_parameters, "vision": "frozen"}
    return validate_parameters(PARAMETERS).model_copy(update=trained)


def test_an_adapter_fits_what_it_was_trained_for(adapter, base, settings):
    adapter.check_base(base)
    adapter.check_settings(settings, asks=True)


def test_another_base_is_refused_and_the_right_one_named(adapter, base_path):
    with pytest.raises(AdapterError, match=r"trained with .*configured .*\(other\).*base_model=data/06_models/tiny"):
        adapter.check_base(BaseModel("other", base_path("qwen2_5_vl")))


def test_every_other_setting_is_named(adapter, settings):
    prompt = PROMPT.model_copy(update={"user": "Another question"})
    image = settings.image.model_copy(update={"max_pixels": 112 * 112})
    others = {"prompt": prompt, "image": image, "vision": "adapted", "quantization": "nf4"}
    with pytest.raises(
        AdapterError, match=r"prompt: .*Another question.*image: .*12544.*vision: .*adapted.*quantization: .*nf4"
    ) as refused:
        adapter.check_settings(settings.model_copy(update=others), asks=True)
    assert "scoring.settings_from=adapter" in str(refused.value)


def asking(question):
    records = [captioned(f"identity_{number}", f"data/{number}.png", "a dog", question) for number in range(3)]
    return Conversations(records)


def test_conversations_that_ask_the_trained_question_fit(adapter, caplog):
    caplog.set_level("INFO")
    adapter.check_asked(asking("Describe this picture."))
    assert caplog.messages == []
    adapter.check_asked([*asking("Describe this picture."), *asking("Which colours?")[:1]])
    (line,) = caplog.messages
    assert line.startswith("1 of 4 conversations ask untrained questions: trained with 'Describe this picture.', ")
    assert "'Which colours?' (1 samples)" in line


def test_conversations_none_of_which_asks_the_trained_question_are_refused(adapter):
    with pytest.raises(AdapterError, match=r"trained with 'Describe this picture.', the conversations ask 'Which"):
        adapter.check_asked(asking("Which colours?"))


def with_prompt(adapter, **prompt):
    edit_json(adapter.path / RECORD_FILE, prompt=prompt)
    return Adapter(adapter.path)


def test_of_several_trained_questions_new_ones_may_be_asked(adapter, settings):
    questions = [{"text": text, "samples": 2} for text in ("How many?", "Where?")]
    several = with_prompt(adapter, user=None, system=None, override=False, questions=questions, other_questions=0)
    several.check_asked(asking("Which colours?"))
    where = PROMPT.model_copy(update={"user": "Where?"})
    several.check_settings(settings.model_copy(update={"prompt": where}), asks=True)
    with pytest.raises(AdapterError, match=r"trained with 'How many\?' \(2 samples\), 'Where\?' .*configured 'Descr"):
        several.check_settings(settings, asks=True)
    several.check_settings(settings, asks=False)


@pytest.mark.parametrize("prompt", [{"user": 5}, {"user": None, "questions": "many", "other_questions": 0}])
def test_a_record_that_does_not_say_what_was_asked_is_named(adapter, prompt):
    with pytest.raises(AdapterError, match=f"`?prompt`?.*{RECORD_FILE}|{RECORD_FILE}.*prompt"):
        _ = with_prompt(adapter, **prompt).trained_prompt


def test_limits_on_files_may_differ(adapter, settings):
    image = settings.image.model_copy(update={"max_source_pixels": 5})
    adapter.check_settings(settings.model_copy(update={"image": image}), asks=True)


def test_a_missing_record_is_named(tmp_path):
    with pytest.raises(MissingArtifactError, match=f"has no {RECORD_FILE}"):
        _ = Adapter(tmp_path).record


def test_a_damaged_record_is_named(adapter):
    (adapter.path / RECORD_FILE).write_text("{")
    with pytest.raises(AdapterError, match=f"{RECORD_FILE} cannot be used: it is not valid JSON"):
        _ = Adapter(adapter.path).record


def test_the_run_is_added_to_the_record(adapter):
    note_run(adapter.path, {"id": "run 1"})
    record = Adapter(adapter.path).record
    assert record["run"] == {"id": "run 1"}
    assert record["prompt"] == PROMPT.model_dump()


def test_weights_that_were_cut_short_are_refused(adapter, base):
    path = adapter.path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="adapter_model.safetensors cannot be used: it ends at byte"):
        adapter.attach(base.load_model("float32", "cpu"))


def test_weights_that_find_no_place_are_refused(adapter, base):
    """PEFT only warns, and the adapter would do nothing."""
    file = adapter.path / WEIGHTS_FILE
    edit_weights(file, lambda w: w.update({name.replace("layers", "blocks"): w.pop(name) for name in list(w)}))
    with pytest.raises(AdapterError, match="missing adapter keys"):
        adapter.attach(base.load_model("float32", "cpu"))


def test_weights_of_another_shape_are_refused(adapter, base):
    file = adapter.path / WEIGHTS_FILE
    edit_weights(file, lambda w: w.update({name: value[:, :1].contiguous() for name, value in w.items()}))
    with pytest.raises(AdapterError, match="size mismatch"):
        adapter.attach(base.load_model("float32", "cpu"))
