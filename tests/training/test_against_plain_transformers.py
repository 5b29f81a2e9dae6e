"""Every family trains and writes as transformers and PEFT alone do from pixels, one conversation at a time."""

import ast
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from qwen_vl_lora.evaluation.generation import write_captions
from qwen_vl_lora.exceptions import ParameterError
from qwen_vl_lora.features import fast_tower
from qwen_vl_lora.features.encoding import encode_pictures
from qwen_vl_lora.features.inputs import choose_pictures
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.adapter import Adapter
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.model.chat import ChatEncoder
from qwen_vl_lora.model.families import QWEN3_5
from qwen_vl_lora.model.lora import add_adapter
from qwen_vl_lora.model.merging import merge_adapter
from qwen_vl_lora.parameters import ExportParameters, GenerationParameters, LoraParameters
from qwen_vl_lora.samples.conversations import parse_conversation
from qwen_vl_lora.training.collator import RowCollator
from qwen_vl_lora.training.last_layer import LastLayer
from qwen_vl_lora.training.rows import check_rows, plan_passes
from qwen_vl_lora.training.train import checkpoint_activations
from tiny_adapters import adapter_record, write_record
from tiny_models import FAMILIES, SHARING
from training import plain_reference
from training.plain_reference import PlainModel

CPU = torch.device("cpu")
NEW_TOKENS = 12


def asked(*parts):
    return {"role": "user", "parts": list(parts)}


def said(text, *, scored=True):
    return {"role": "assistant", "parts": [text], "scored": scored}


def talks_about(pictures, family):
    """Ragged answers, several captions of a picture, two pictures in a sample, several turns, none of them."""
    one, two, three, _ = pictures
    question = "Describe this picture."
    scored = family != "qwen3_5"  # an answer loses its think block when another turn follows
    return [
        [asked(one, question), said("star")],
        [asked(one, question), said("a much longer caption about a small blue square on grey")],
        [asked(one, question), said("two green crosses")],
        [asked(two, question), said("big red circle")],
        [asked(three, " and ", two, "What differs?"), said("the first is larger than the second")],
        [asked(two, "What is it?"), said("a star", scored=scored), asked("And ", one, "?"), said("red")],
        [asked("Hello"), said("Hi there")],
    ]


def record_of(number, talk):
    def value(part):
        return f"<|vision_start|>data/files/{part.name}<|vision_end|>" if isinstance(part, Path) else part

    turns = [
        {"from": turn["role"], "value": "".join(map(value, turn["parts"]))}
        | ({"loss": False} if turn.get("scored") is False else {})
        for turn in talk
    ]
    return {"id": str(number), "conversations": turns}


class Project:
    """A base with an adapter that changes it, by this project's own parts: stored features and packed rows.

    With `vision: adapted` the adapter reaches every layer of the tower, and pictures come as pixels.
    """

    def __init__(self, base, images, image, folder, vision):
        self.base, self.images = base, images
        self.processor = base.load_processor()
        self.encoder = ChatEncoder(self.processor, image, images)
        store = FeatureStore(folder / "store")
        store.publish(encode_pictures(images, base, image, "float32", CPU, store, folder / "staging"))
        self.pictures = choose_pictures(vision, base, self.encoder, store, "float32")
        self.layers = base.geometry.projections | (base.geometry.tower if vision == "adapted" else {})
        lora = LoraParameters(
            r=4,
            lora_alpha=8,
            lora_dropout=0.0,
            bias="none",
            target_modules=list(self.layers),
            use_rslora=False,
            use_dora=False,
            init_lora_weights=False,
        )
        # Of the adapter of seed 0, a gradient of Qwen3.5 moves by 3e-4 when plain weights move by 1e-6.
        self.model = add_adapter(base.load_model("float32", "cpu"), lora, vision, seed=1)
        self.model.save_pretrained(folder / "adapter")
        write_record(folder / "adapter", adapter_record(base, lora=lora.model_dump(), vision=vision))
        self.adapter = Adapter(folder / "adapter")
        self.last_layer = LastLayer(self.model.get_base_model(), base.family)
        if vision == "frozen":
            base.family.drop_tower(self.model.get_base_model())

    def conversations(self, talks):
        return [parse_conversation(record_of(number, talk)) for number, talk in enumerate(talks)]

    def passes(self, talks, rows):
        collate = RowCollator(self.encoder, self.pictures)
        encoded = [self.encoder.encode(conversation) for conversation in self.conversations(talks)]
        return [collate(rows) for rows in plan_passes(encoded, rows, 3)]

    def predictions(self, forward):
        return self.last_layer.scored_logits(self.model, forward.inputs, forward.source), forward.labels

    def loss(self, talks, rows):
        passes = self.passes(talks, rows)
        return sum(functional.cross_entropy(*self.predictions(one), reduction="sum") for one in passes)

    def gradients(self, talks, rows):
        trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        return dict(zip(trained, torch.autograd.grad(self.loss(talks, rows), trained.values()), strict=True))

    def captions(self, talks, batch_size):
        settings = GenerationParameters(max_new_tokens=NEW_TOKENS, repetition_penalty=1.0, batch_size=batch_size)
        prompts = [self.encoder.encode_prompt(conversation) for conversation in self.conversations(talks)]
        return [one.text for one in write_captions(self.model, self.processor, prompts, self.pictures, settings, "")]


def norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


@pytest.fixture
def limits(image_parameters):
    return {"min_pixels": image_parameters.min_pixels, "max_pixels": image_parameters.max_pixels}


@pytest.fixture
def setting(base_path, images, image_parameters, tmp_path, limits):
    """`setting(family)`: the project's side, the plain side, and conversations."""

    def make(family, vision="frozen"):
        project = Project(BaseModel("tiny", base_path(family)), images, image_parameters, tmp_path, vision)
        options = {"enable_thinking": False} if family == "qwen3_5" else {}
        plain = PlainModel(base_path(family), project.adapter.path, options, limits)
        return project, plain, talks_about([images.files / f"{entry.sha256}.png" for entry in images], family)

    return make


WAYS = [
    *((family, "separate", "frozen") for family in FAMILIES),
    *((family, "shared", "frozen") for family in SHARING),
    *((family, "separate", "adapted") for family in FAMILIES),
]


@pytest.mark.parametrize(("family", "rows", "vision"), WAYS)
def test_loss_and_gradients_are_those_of_plain_transformers_from_pixels(setting, family, rows, vision):
    project, plain, talks = setting(family, vision)
    assert len(project.passes(talks, rows)) < len(talks)
    # Linear attention's gradients amplify the rounding of the faster tower.
    assert_equal(project, plain, talks, rows, tolerance=1e-5 if family in SHARING else 1e-4)


def test_with_features_of_transformers_own_tower_linear_attention_has_its_gradients_too(setting, monkeypatch):
    monkeypatch.setattr(fast_tower, "quicken", lambda tower: tower)
    assert_equal(*setting("qwen3_5"), "separate", tolerance=1e-5)


def assert_equal(project, plain, talks, rows, tolerance):
    assert project.loss(talks, rows).item() == pytest.approx(plain.loss(talks).item(), rel=1e-5)
    ours, theirs = project.gradients(talks, rows), plain.gradients(talks)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 2 * sum(count for count, _, _ in project.layers.values())
    assert norm(ours[name] - theirs[name] for name in theirs) <= 1e-5 * norm(theirs.values())
    for name, gradient in theirs.items():
        assert gradient.norm() > 0, name
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_from_stored_features_in_padded_rows_are_those_of_pixels_alone(setting, family):
    project, plain, talks = setting(family)
    with torch.inference_mode():
        theirs = {str(number): plain.answers(talk) for number, talk in enumerate(talks)}
        for forward in project.passes(talks, "separate"):
            ours, labels = project.predictions(forward)
            logits, tokens = map(torch.cat, zip(*(theirs[name] for name in forward.sample_ids), strict=True))
            assert torch.equal(labels, tokens)
            torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_the_plain_adapter_and_the_merged_model_write_the_same_captions(setting, family, limits, tmp_path):
    project, plain, talks = setting(family)
    questions = [talk[:-1] for talk in talks]
    batched, single = project.captions(talks, 4), project.captions(talks, 1)
    assert batched == single == [plain.caption(talk, NEW_TOKENS) for talk in questions]
    assert len(set(single)) > 3

    probe = plain.inputs(talks[0], asks=False)
    merge_adapter(
        project.base,
        project.adapter,
        tmp_path / "merged",
        ExportParameters(dtype="base", max_shard_size="5GB"),
        CPU,
        lambda model: torch.no_grad()(model)(**probe).logits,
    )
    merged = PlainModel(tmp_path / "merged", None, plain._options, limits)
    assert [merged.caption(talk, NEW_TOKENS) for talk in questions] == single


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stands_in_the_padding_changes_nothing(setting, family):
    project, _, talks = setting(family)
    passes = project.passes(talks, "separate")
    padded = [one for one in passes if (one.inputs["input_ids"] == project.encoder.pad_id).any()]
    assert len(padded) > 1
    for forward in padded:
        ids = forward.inputs["input_ids"]
        other = {**forward.inputs, "input_ids": torch.where(ids == project.encoder.pad_id, 7, ids)}
        with torch.inference_mode():
            logits = [project.model(**inputs, use_cache=False).logits for inputs in (forward.inputs, other)]
        assert torch.equal(*(one[tuple(forward.source)] for one in logits))


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_give_the_same_gradients(setting, family):
    project, _, talks = setting(family)
    kept = project.gradients(talks, "separate")
    checkpoint_activations(project.model.get_base_model(), project.base.family, "frozen")
    project.model.train()
    for name, gradient in project.gradients(talks, "separate").items():
        torch.testing.assert_close(gradient, kept[name], rtol=1e-5, atol=1e-7)


def test_shared_rows_would_be_wrong_where_they_are_refused(setting):
    project, plain, talks = setting("qwen3_5")
    assert abs(project.loss(talks, "shared") - plain.loss(talks)) > 0.01
    with pytest.raises(ParameterError, match=r"rows: `shared` puts .* Qwen3\.5 .* Set rows: separate"):
        check_rows([project.encoder.encode(one) for one in project.conversations(talks)], "shared", QWEN3_5)
    alone = [project.encoder.encode(one) for one in project.conversations(talks[2:])]
    check_rows(alone, "shared", QWEN3_5)  # one caption a picture


def test_the_reference_knows_nothing_of_this_project():
    tree = ast.parse(Path(plain_reference.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert not [name for name in names if "qwen_vl_lora" in str(name) or "tiny_models" in str(name)]
