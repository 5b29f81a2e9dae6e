"""Features are served for exactly the picture, tower, size and dtype they were made of."""

import importlib.metadata
import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_vl_lora.exceptions import DataFormatError, MissingArtifactError
from qwen_vl_lora.features.encoding import encode_pictures
from qwen_vl_lora.features.fast_tower import PatchProduct, quicken
from qwen_vl_lora.features.key import FeatureKey
from qwen_vl_lora.features.store import FeatureStore
from qwen_vl_lora.model.base_model import BaseModel
from qwen_vl_lora.runs.storage import file_sha256
from qwen_vl_lora.samples.image_store import ImageStore
from tiny_models import FAMILIES, store_pictures

CPU = torch.device("cpu")


@pytest.fixture
def base(base_path):
    return BaseModel("tiny", base_path("qwen2_vl"))


@pytest.fixture
def store(tmp_path):
    return FeatureStore(tmp_path / "store")


@pytest.fixture
def encode(base, store, image_parameters, tmp_path):
    """Encode and publish; returns how many pictures were new."""

    def run(images, base=base, image=image_parameters, dtype="float32"):
        before = len(store.features(FeatureKey.of(base, image.size, dtype)))
        store.publish(encode_pictures(images, base, image, dtype, CPU, store, tmp_path / "staging"))
        return len(store.features(FeatureKey.of(base, image.size, dtype))) - before

    return run


def test_every_distinct_picture_is_encoded_once(encode, images):
    assert encode(images) == len(images)
    assert encode(images) == 0


def test_the_store_grows_by_new_pictures_only(encode, images, store, tmp_path):
    encode(images)
    shards = set(store.root.rglob("*.safetensors"))
    more = store_pictures(tmp_path / "more", [(112, 112), (56, 140), (140, 84), (84, 56), (84, 84)])
    assert encode(more) == 1
    assert shards < set(store.root.rglob("*.safetensors"))


def test_another_tower_is_never_served(encode, images, base, tmp_path):
    encode(images)
    folder = shutil.copytree(base.path, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "visual." in name)
    weights[name].view(torch.uint8).flatten()[0] ^= 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copystat(base.path / "model.safetensors", folder / "model.safetensors")
    assert encode(images, base=BaseModel("tiny", folder)) == len(images)


def test_another_size_or_dtype_is_never_served(encode, images, image_parameters):
    encode(images)
    smaller = image_parameters.model_copy(update={"max_pixels": 84 * 84})
    assert encode(images, image=smaller) == len(images)
    assert encode(images, dtype="bfloat16") == len(images)


def test_a_picture_with_one_other_byte_is_another_picture(encode, images, base, image_parameters, store):
    encode(images)
    entry = next(iter(images))
    file = images.file(entry.sha256)
    before = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # the end marker's checksum, which no decoder looks at: only the bytes differ
    file.write_bytes(data)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    with pytest.raises(DataFormatError, match="was altered: its name is no longer its sha256"):
        images.open(entry.sha256)
    other = entry._replace(sha256=file_sha256(file))
    file.rename(file.with_name(other.file_name))
    changed = ImageStore(images.files, [other, *list(images)[1:]], {})
    assert encode(changed) == 1
    assert other.sha256 in store.features(FeatureKey.of(base, image_parameters.size, "float32"))


@pytest.mark.parametrize("library", ["transformers", "torch", "pillow"])
def test_another_version_of_a_library_is_never_served(encode, images, library, monkeypatch, caplog):
    encode(images)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version(name) + ".1" * (name == library))
    caplog.set_level(logging.INFO)
    assert encode(images) == len(images)
    assert "Features stored by an older version (other libraries) are not used." in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_quickened_tower_gives_the_features_of_transformers_own(base_path, family, dtype, bound):
    base = BaseModel("tiny", base_path(family))
    plain, quick = (base.load_vision_tower(dtype, "cpu") for _ in range(2))
    assert isinstance(quicken(quick).patch_embed.proj, PatchProduct)
    grid = torch.tensor([[1, 8, 4], [1, 2, 6]])
    pixels = torch.randn(int(grid.prod(-1).sum()), quick.patch_embed.proj.weight.shape[1:].numel())
    with torch.inference_mode():
        wanted, given = (
            base.family.stored_features(tower(pixels.to(tower.dtype), grid_thw=grid)).float()
            for tower in (plain, quick)
        )
    assert (given - wanted).norm() <= bound * wanted.norm()


def test_settings_that_do_not_touch_pixels_share_features(encode, images, image_parameters):
    encode(images)
    assert encode(images, image=image_parameters.model_copy(update={"allowed_roots": ["/data"]})) == 0


def test_a_deleted_shard_is_encoded_again(encode, images, store):
    encode(images)
    for shard in store.root.rglob("*.safetensors"):
        shard.unlink()
    assert encode(images) == len(images)


def test_a_damaged_shard_is_noticed_and_encoded_again(encode, images, store, base, image_parameters, caplog):
    encode(images)
    features = store.features(FeatureKey.of(base, image_parameters.size, "float32"))
    name = next(iter(images)).sha256
    whole = features.get(name).clone()
    (shard,) = store.root.rglob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        encode(images)
    assert "damaged" in caplog.text
    assert torch.equal(store.features(FeatureKey.of(base, image_parameters.size, "float32")).get(name), whole)


def test_two_runs_that_encode_at_once_do_no_harm(images, base, image_parameters, store, tmp_path):
    arguments = (images, base, image_parameters, "float32", CPU, store)
    first = encode_pictures(*arguments, tmp_path / "staging")
    second = encode_pictures(*arguments, tmp_path / "staging")  # began before the first published
    elsewhere = encode_pictures(*arguments, tmp_path / "other workspace")
    for staged in (first, second, elsewhere):
        store.publish(staged)
    assert len(store.features(FeatureKey.of(base, image_parameters.size, "float32"))) == len(images)


def test_a_killed_run_keeps_its_finished_shards(images, base, image_parameters, store, tmp_path, monkeypatch):
    import qwen_vl_lora.features.tower as tower

    monkeypatch.setattr(tower, "_CUT_PICTURES", 1)
    monkeypatch.setattr(tower, "SHARD_PICTURES", (1, 1))
    write, written = tower._write_shard, []

    def write_two_then_die(features, staging):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.extend(features)
        write(features, staging)

    monkeypatch.setattr(tower, "_write_shard", write_two_then_die)
    arguments = (images, base, image_parameters, "float32", CPU, store, tmp_path / "staging")
    with pytest.raises(KeyboardInterrupt):
        encode_pictures(*arguments)
    encoded_now = []
    monkeypatch.setattr(tower, "_write_shard", lambda f, s: (encoded_now.extend(f), write(f, s)))
    store.publish(encode_pictures(*arguments))
    assert len(encoded_now) == len(images) - 2
    assert len(store.features(FeatureKey.of(base, image_parameters.size, "float32"))) == len(images)


def test_a_picture_that_was_never_encoded_is_named(base, image_parameters, store):
    features = store.features(FeatureKey.of(base, image_parameters.size, "float32"))
    with pytest.raises(MissingArtifactError, match="No stored features for picture abc.*encode_images"):
        features.get("abc")
