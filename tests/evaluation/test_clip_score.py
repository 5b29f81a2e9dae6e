"""CLIPScore has the paper's value on vectors made by hand, and its form on a random tiny CLIP."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evaluation.rows import table_of, with_contender
from qwen_vl_lora.evaluation.clip_score import PREFIX, Clip, clip_scores, find_clip, score_with_clip
from qwen_vl_lora.evaluation.predictions import read_predictions
from qwen_vl_lora.exceptions import MissingArtifactError, ParameterError


def test_the_value_is_that_of_the_paper():
    captions = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    pictures = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    references = [np.array([[0.0, 1.0], [6.0, 8.0]]), np.array([[1.0, 0.0]]), np.array([[0.0, -1.0]])]
    alone, both = clip_scores(captions, pictures, references)
    # cos 0.6 gives 1.5, its nearest reference has cos 1; cos -1 counts 0; cos 1 gives 2.5, the reference counts 0.
    assert alone == pytest.approx([1.5, 0.0, 2.5])
    assert both == pytest.approx([2 * 1.5 * 1 / 2.5, 0.0, 0.0])


def test_scores_are_those_of_transformers_own_embeddings(clip_path, images):
    from transformers import CLIPModel, CLIPProcessor

    clip = Clip(clip_path, torch.device("cpu"))
    table = table_of([(["a dog", "one dog"], "base", "tuned one"), (["a cat"], "", "tuned two")])
    entries = list(images)[:2]
    table["image_path"] = [entry.path for entry in entries]
    predictions = read_predictions(with_contender(table, "older", ["x", "y"]))
    found = score_with_clip(predictions, ["base", "tuned", "older"], images, clip)
    model, processor = CLIPModel.from_pretrained(clip_path).eval(), CLIPProcessor.from_pretrained(clip_path)
    with torch.inference_mode():
        for row, item in enumerate(predictions):
            texts = [f"{PREFIX}{text}" for text in (item.tuned_caption, *item.references)]
            inputs = processor(text=texts, images=images.open(entries[row].sha256), padding=True, return_tensors="pt")
            out = model(**inputs)
            cosines = out.logits_per_image[0] / model.logit_scale.exp()
            near = max(torch.nn.functional.cosine_similarity(out.text_embeds[:1], out.text_embeds[1:]).tolist())
            alone = 2.5 * max(0.0, float(cosines[0]))
            both = 2 * alone * near / (alone + near) if near > 0 and alone > 0 else 0.0
            assert found["tuned"][0][row] == pytest.approx(alone, abs=1e-5)
            assert found["tuned"][1][row] == pytest.approx(both, abs=1e-5)
    assert found.keys() == {"base", "tuned", "older"}


def test_texts_that_are_longer_than_clip_sees_are_noted(clip_path):
    clip = Clip(clip_path, torch.device("cpu"))
    assert clip.limit == 24
    length = len(PREFIX.replace(" ", ""))  # a token for each letter, and two for start and end
    fits, long = "b" * (24 - 2 - length), "b" * (24 - 1 - length)
    made = clip.of_texts([fits, long, long + " and more"])
    assert clip.truncated == {long, long + " and more"}
    assert made.shape == (3, 8)


def test_a_question_without_a_picture_has_no_score(clip_path, images):
    clip = Clip(clip_path, torch.device("cpu"))
    table = table_of([(["a dog"], "one", "two"), (["a cat"], "three", "four")])
    table["image_path"] = ["", next(iter(images)).path]
    alone, both = score_with_clip(read_predictions(table), ["tuned"], images, clip)["tuned"]
    assert np.isnan([alone[0], both[0]]).all()
    assert 0 <= alone[1] <= 2.5


def test_what_is_no_clip_is_refused_with_its_place(tmp_path, clip_path, base_path):
    assert find_clip("clip", tmp_path) == clip_path
    with pytest.raises(MissingArtifactError, match=r"evaluation.clip_score names 'nothing', which is not a directory"):
        find_clip("nothing", tmp_path)
    with pytest.raises(MissingArtifactError, match=r"names 'owner/name', .* such as hf:owner/name"):
        find_clip("owner/name", tmp_path)
    assert find_clip("hf:owner/name", tmp_path).repository.id == "owner/name"
    with pytest.raises(ParameterError, match=r"evaluation.clip_score: .* cannot be loaded as a CLIP model"):
        Clip(base_path("qwen2_vl"), torch.device("cpu"))
    (clip_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ParameterError, match=r"evaluation.clip_score: .* cannot be loaded as a CLIP model"):
        Clip(clip_path, torch.device("cpu"))
