"""Bases with random weights and drawn pictures to train them on: what both sides load from disk.

The replica is Qwen2-VL-2B at 1/64: width and depth a quarter each, vocabulary a sixteenth. Its
proportions, and so the shares of vision, language and logits in a step, are those of the real one.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import vocabulary
from benchmarks.jobs import Job, overlaid, write_json
from qwen_vl_lora.parameters import Parameters
from qwen_vl_lora.samples.records import SourceSample, Turn
from qwen_vl_lora.tiny.drawing import Scene, draw_picture
from qwen_vl_lora.tiny.language import enumerate_words, name, short_captions
from qwen_vl_lora.tiny.partitions import Partition, draw_distinct_scenes

SEED = 42
JPEG_QUALITY = 90
SHARD = "2GB"
"""Largest file of weights: a base of full size has several, as the published ones."""
SOURCE_SIZE = (480, 360)
"""Pixels of the pictures for data engineering: COCO's shape at three quarters of its size."""
PROJECT = Path(__file__).parents[1]
SHIPPED_TINY = PROJECT / "data" / "06_models" / "tiny_qwen2_vl"
VALIDATION_IMAGES = 16
ADAPTER_IMAGES = 160


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Qwen2-VL or Qwen2.5-VL. `vocabulary` may be larger than the tokenizer's, as Qwen's own is."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    vocabulary: int
    mrope_section: tuple[int, int, int]
    vision_width: int
    vision_depth: int
    vision_heads: int
    vision_intermediate: int | None = None
    """Set on Qwen2.5-VL only, whose vision MLP is no fixed multiple of its width."""
    tied: bool = True
    spread: float = 0.02
    """Standard deviation of the weights. Of a narrow model with Qwen's own 0.02 no hidden state could lift a token's
    logit far enough to halve any loss."""


GEOMETRIES = {
    "toy": Geometry(64, 2, 2, 1, 96, 700, (4, 6, 6), 32, 2, 2, spread=0.1),
    # Narrow, with the true vocabulary.
    "narrow": Geometry(64, 2, 2, 1, 96, 151_936, (4, 6, 6), 32, 2, 2, spread=0.1),
    "narrow-2.5": Geometry(64, 2, 2, 1, 96, 152_064, (4, 6, 6), 32, 2, 2, 48, tied=False, spread=0.1),
    "replica": Geometry(384, 7, 6, 1, 2240, 9_496, (8, 12, 12), 320, 8, 4),
    "2b": Geometry(1536, 28, 12, 2, 8960, 151_936, (16, 24, 24), 1280, 32, 16),
    "7b": Geometry(3584, 28, 28, 4, 18_944, 152_064, (16, 24, 24), 1280, 32, 16, 3420, tied=False),
}


def build_base(folder: Path, geometry: Geometry, dtype: str = "float32", device: str = "cpu") -> Path:
    """Write a base with random weights, the same for the same geometry, and a processor.

    A geometry that holds Qwen's vocabulary gets the processor of `vocabulary`, others that of the tiny base.
    """
    import torch

    from qwen_vl_lora.tiny import tiny_model

    is_real = geometry.vocabulary >= vocabulary.SIZE
    processor = vocabulary.build_processor() if is_real else tiny_model.build_processor(SEED)
    model_class, config = _architecture(geometry, processor.tokenizer)
    torch.manual_seed(SEED)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            model = model_class(config)
    finally:
        torch.set_default_dtype(before)
    ends = config.text_config.eos_token_id
    model.generation_config.update(do_sample=False, repetition_penalty=1.0, eos_token_id=ends, pad_token_id=ends)
    model.save_pretrained(folder, max_shard_size=SHARD)
    processor.save_pretrained(folder)
    return folder


def _architecture(geometry: Geometry, tokenizer: Any) -> tuple[Any, Any]:
    """Model class and config of a geometry."""
    import transformers

    from qwen_vl_lora.tiny.tiny_model import SPECIAL_TOKENS

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": geometry.vocabulary,
        "hidden_size": geometry.hidden,
        "intermediate_size": geometry.intermediate,
        "num_hidden_layers": geometry.layers,
        "num_attention_heads": geometry.heads,
        "num_key_value_heads": geometry.key_value_heads,
        "max_position_embeddings": 32_768,
        "initializer_range": geometry.spread,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(geometry.mrope_section)},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": geometry.tied,
    }
    vision: dict[str, Any] = {"depth": geometry.vision_depth, "num_heads": geometry.vision_heads}
    if geometry.vision_intermediate is None:
        vision |= {"embed_dim": geometry.vision_width, "hidden_size": geometry.hidden}
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
        return transformers.Qwen2VLForConditionalGeneration, config
    vision |= {
        "hidden_size": geometry.vision_width,
        "out_hidden_size": geometry.hidden,
        "intermediate_size": geometry.vision_intermediate,
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen2_5_VLForConditionalGeneration, config


def build_tiny(folder: Path) -> Path:
    """The shipped tiny base, or one of its shape with random weights where it was not built yet."""
    if (SHIPPED_TINY / "config.json").is_file():
        return SHIPPED_TINY
    from qwen_vl_lora.tiny.tiny_model import TinySizes, build_model, build_processor

    processor = build_processor(SEED)
    build_model(TinySizes(), processor.tokenizer, SEED).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def captions_of(scene: Scene) -> list[str]:
    """Five captions of one picture, about as long as COCO's."""
    things = enumerate_words([name(thing) for thing in scene.things])
    return [*short_captions(scene), f"{scene.background} background, {things}", f"{things} on all {scene.background}"]


def draw_samples(partition: Partition, images: int, captions: int, side: int) -> Iterator[SourceSample]:
    """One sample per caption of drawn JPEG pictures of `side` px, no two with the same content."""
    scenes = draw_distinct_scenes(partition, random.Random(f"bench/{SEED}"), images)
    for number, scene in enumerate(scenes):
        jpeg = encode_jpeg(scene, side, side)
        for caption in captions_of(scene)[:captions]:
            yield SourceSample(number + 1, f"picture_{number:06d}", (jpeg,), (Turn("assistant", caption),))


def encode_jpeg(scene: Scene, width: int, height: int, grain: Any = None) -> bytes:
    """The scene as JPEG of the given size, with `grain` (height, width, 3) added to its levels."""
    picture = draw_picture(scene).resize((width, height))
    if grain is not None:
        picture = Image.fromarray((np.asarray(picture, dtype=np.int16) + grain).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def write_parameters(folder: Path, changes: dict[str, Any]) -> Parameters:
    """conf/base as Kedro reads it, with the workload's settings over it, as `parameters.json`."""
    from kedro.config import OmegaConfigLoader

    loader = OmegaConfigLoader(conf_source=str(PROJECT / "conf"), base_env="base", default_run_env="base")
    tree = overlaid(dict(loader["parameters"]), changes)
    write_json(folder / "parameters.json", tree)
    return Parameters.model_validate(tree)


def write_split(folder: Path, split: str, samples: Iterator[SourceSample], parameters: Parameters) -> None:
    """Pictures in a content-addressed store and `<split>.json`, by the project's own data nodes."""
    from benchmarks.project import call_node, save_images, workspace_in
    from qwen_vl_lora.pipelines.data_engineering.nodes import build_conversations, collect_samples

    workspace = workspace_in(folder, split)
    collected = call_node(collect_samples, parameters, captioned_images=samples, workspace=workspace)
    images = save_images(collected.images, folder / split / "manifest.csv")
    conversations = call_node(build_conversations, parameters, samples=collected.samples, images=images)
    write_json(folder / f"{split}.json", list(conversations))


def prepare_base(job: Job) -> dict[str, Any]:
    """Write the base that `options.base` names; gives its directory."""
    name = job.options["base"]
    path = build_tiny(job.data) if name == "tiny" else build_base(job.data, GEOMETRIES[name], **job.options["weights"])
    return {"path": str(path)}


def prepare_training(job: Job) -> dict[str, Any]:
    """Write training and validation pictures, conversations and parameters."""
    options = job.options
    parameters = write_parameters(job.data, options["parameters"])
    shape = {"captions": options["captions"], "side": options["side"]}
    write_split(job.data, "train", draw_samples(Partition.FINE_TUNING, options["images"], **shape), parameters)
    count = min(VALIDATION_IMAGES, options["images"])
    write_split(job.data, "validation", draw_samples(Partition.HELD_OUT, count, **shape), parameters)
    return {}


def prepare_captioning(job: Job) -> dict[str, Any]:
    """Write test pictures, and an adapter to caption them with; gives its directory."""
    from benchmarks import project

    options = job.options
    parameters = write_parameters(job.data, options["parameters"])
    shape = {"captions": 1, "side": options["side"]}
    write_split(job.data, "test", draw_samples(Partition.HELD_OUT, options["images"], **shape), parameters)
    count = min(ADAPTER_IMAGES, 4 * options["images"])
    write_split(job.data, "train", draw_samples(Partition.FINE_TUNING, count, **shape), parameters)
    return {"adapter": project.train(job)["adapter"]}


def prepare_source(job: Job) -> dict[str, Any]:
    """Write photo-like pictures and the CSV that names them."""
    import csv

    write_parameters(job.data, job.options["parameters"])
    pictures = job.data / "pictures"
    pictures.mkdir()
    grains = _photo_grains(*SOURCE_SIZE)
    scenes = draw_distinct_scenes(Partition.FINE_TUNING, random.Random(f"bench/{SEED}"), job.options["images"])
    with (job.data / "captions.csv").open("w", encoding="utf-8", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(("image_id", "image_path", "caption"))
        for number, scene in enumerate(scenes):
            path = pictures / f"{number:06d}.jpg"
            path.write_bytes(encode_jpeg(scene, *SOURCE_SIZE, grains[number % len(grains)]))
            writer.writerow((f"picture_{number:06d}", path.relative_to(job.data), captions_of(scene)[0]))
    return {}


def _photo_grains(width: int, height: int, count: int = 16) -> list[Any]:
    """Detail for drawn pictures, (height, width, 3) int16: flat areas would make JPEGs that are a tenth of a photo's.

    With it a picture takes about half a byte per pixel, as COCO's do.
    """
    rng = np.random.default_rng(SEED)
    return [rng.normal(0, 9, (height, width, 3)).round().astype(np.int16) for _ in range(count)]
