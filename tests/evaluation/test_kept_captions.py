"""Kept captions are those that were written for the same key and question, or they are not used."""

import functools
import json

import pytest
import yaml

from conftest import PROJECT
from qwen_vl_lora.evaluation.comparison import Side, SideWriter
from qwen_vl_lora.evaluation.generation import Caption
from qwen_vl_lora.evaluation.kept_captions import KeptCaptions, question_digest
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.parameters import validate_parameters
from qwen_vl_lora.samples.conversations import Conversations
from tiny_adapters import save_adapter
from tiny_models import captioned

WRITTEN = {"q1": Caption("a dog\u2028runs", False), "q2": Caption("", True), "q3": Caption("ein Hünd", False)}


@pytest.fixture
def kept(tmp_path):
    KeptCaptions(tmp_path, "key", WRITTEN).add(WRITTEN)
    return lambda key="key", questions=WRITTEN: KeptCaptions(tmp_path, key, questions)


def test_captions_are_read_as_they_were_written(kept):
    assert kept().captions == WRITTEN
    assert kept(questions=["q2", "other"]).captions == {"q2": WRITTEN["q2"]}
    kept().add({"q4": Caption("a cat", False)})
    assert kept(questions=["q1", "q4"]).captions == {"q1": WRITTEN["q1"], "q4": Caption("a cat", False)}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace("a dog", "a cat"),
        lambda text: text[text.index("dog") :],
        lambda text: text.replace('"cut": false', '"cut": true', 1),
        lambda text: "nonsense\n" + text.partition("\n")[2],
        lambda text: '["q1"]\n' + text.partition("\n")[2],
        lambda text: text.replace("q1", "q9"),
    ],
)
def test_a_damaged_line_is_reported_once_and_made_again(kept, caplog, damage):
    file = kept().file
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    assert kept(questions=[*WRITTEN, "q9"]).captions == {name: WRITTEN[name] for name in ("q2", "q3")}
    assert "Damaged lines in " in caplog.text
    caplog.clear()
    kept().add({"q1": WRITTEN["q1"]})
    assert kept().captions == WRITTEN
    assert not caplog.records


def test_a_line_that_a_kill_cut_is_made_again(kept):
    file = kept().file
    file.write_bytes(file.read_bytes()[:-9])
    assert kept().captions.keys() == {"q1", "q2"}


def test_bytes_that_are_no_text_are_not_used(kept):
    file = kept().file
    file.write_bytes(b"\xff\x00" + file.read_bytes())
    assert kept().captions.keys() == {"q2", "q3"}


def test_captions_of_another_key_are_not_used(kept):
    file = kept().file
    file.rename(file.with_stem("other"))
    assert kept("other").captions == {}


def test_what_a_server_did_not_answer_is_asked_again(kept):
    unanswered = kept(questions=["q4"])
    unanswered.add({"q4": Caption("", False, "not_captioned: too dark")})
    assert unanswered.captions["q4"].reason
    assert kept(questions=["q4"]).captions == {}


def test_a_question_is_all_turns_before_the_last_answer_and_the_bytes_of_its_pictures(images):
    first, second = list(images)[:2]

    def digest_of(path, prompt, *more):
        record = captioned("x", path, "an answer", prompt)
        record["conversations"] += [{"from": role, "value": text} for role, text in more]
        return question_digest(Conversations([record])[0], images)

    plain = digest_of(first.path, "What?")
    other_answer = captioned("y", first.path, "another answer", "What?")
    assert question_digest(Conversations([other_answer])[0], images) == plain
    others = {
        digest_of(second.path, "What?"),
        digest_of(first.path, "Who?"),
        digest_of(first.path, "What?", ("user", "And?"), ("assistant", "no")),
    }
    assert len(others | {plain}) == 4


def test_a_side_has_a_key_for_everything_that_may_change_its_captions(base_path, images, tmp_path, monkeypatch):
    monkeypatch.setattr(BaseModel, "load_processor", functools.cache(BaseModel.load_processor))
    base, other = (BaseModel("tiny", base_path(family)) for family in ("qwen2_vl", "qwen2_5_vl"))
    adapter = save_adapter(tmp_path / "adapter", base)
    tree = yaml.safe_load((PROJECT / "conf/base/parameters.yml").read_text(encoding="utf-8"))
    asked = Conversations([captioned("x", entry.path, "x", "What?") for entry in images])

    def key(side, **groups):
        changed = {name: {**tree[name], **values} for name, values in groups.items()}
        settings = validate_parameters({**tree, **changed})
        return SideWriter([side], images, FeatureStore(tmp_path / "features"), settings, asked).key(side)

    plain = Side("base", base)
    found = [
        key(plain),
        key(Side("base", other)),
        key(Side("base", base, adapter)),
        key(plain, generation={"max_new_tokens": 7}),
        key(plain, generation={"repetition_penalty": 1.1}),
        key(plain, generation={"batch_size": 3}),
        key(plain, image={"resized_height": 56}),
        key(plain, training_args={"bf16": True}),
    ]
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    found.append(key(plain))
    monkeypatch.setattr("qwen_vl_lora.evaluation.comparison.ARITHMETIC", 0)
    found.append(key(plain))
    config = adapter.path / "adapter_config.json"
    found.append(key(Side("tuned", base, adapter)))
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 5}))
    found.append(key(Side("tuned", base, adapter)))
    assert len(set(found)) == len(found)
    assert key(plain) == key(Side("contender", base))
    assert key(plain, lora={"r": 3}, training_args={"learning_rate": 0.5}) == key(plain)
