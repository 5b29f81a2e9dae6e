"""`make verify-recipe ENV=…`: run a recipe on real weights, and say what should have come out.

    python -m benchmarks.verify_recipe --env qwen2_vl_2b_coco [--params "captions_file=…"] [--no-run]

The recipes were never run on real weights where this was built. What can be derived without running
(samples, steps, image tokens, trainable parameters) is compared here; what cannot is printed for a
person to judge. Ends with status 1 when something that was derived does not hold.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

COCO_SAMPLES = (496, 4)
"""Training and test samples of the first 500 rows, where no held-out image has a second caption among them."""

TUTORIAL_SECONDS = 117
"""What the Qwen2-VL tutorial reports for its 496 samples, 2 epochs, on 4 A100 of 40 GB."""


class Check(NamedTuple):
    """A value and what it should be; `expected` None is for a person to judge, by the note."""

    what: str
    came: Any
    expected: Any
    note: str

    @property
    def holds(self) -> bool:
        return self.expected is None or self.came == self.expected


def main() -> int:
    """Run, compare, print. Returns the exit status."""
    arguments = _parse_arguments()
    if arguments.run:
        command = [sys.executable, "-m", "kedro", "run", "--env", arguments.env, "--params", arguments.params]
        status = subprocess.run(command, check=False).returncode
        if status:
            print(f"\nThe run itself failed (status {status}): there is nothing to compare.")
            return status
    checks = compare(arguments.env, arguments.params)
    for check in checks:
        verdict = "look  " if check.expected is None else "ok    " if check.holds else "DIFFERS"
        wanted = "" if check.expected is None else f" (expected {check.expected})"
        print(f"{verdict} {check.what}: {check.came}{wanted}. {check.note}")
    return 0 if all(check.holds for check in checks) else 1


def compare(env: str, params: str) -> list[Check]:
    """Everything that the newest run of a recipe left, beside what should be there."""
    from kedro.framework.cli.utils import _split_params
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project

    from qwen_vl_lora.parameters import validate_parameters

    bootstrap_project(Path.cwd())
    with KedroSession.create(env=env, runtime_params=_split_params(None, None, params)) as session:
        context = session.load_context()
        loaded = {
            name: context.catalog[name].load()
            for name in ("base_model", "split_summary", "training_summary", "batch_preview", "predictions")
        }
        settings = validate_parameters(dict(context.config_loader["parameters"])).model_dump()
    return [
        *_base_checks(loaded["base_model"]),
        *_data_checks(env, settings, loaded["split_summary"]["samples"], loaded["batch_preview"], loaded["base_model"]),
        *_training_checks(settings, loaded["training_summary"], loaded["base_model"]),
        *_caption_checks(loaded["predictions"]),
    ]


def _base_checks(base: Any) -> list[Check]:
    return [
        Check("base model", f"{base.name} {base.revision or ''}", None, "The model of the tutorial?"),
        Check("base fingerprint", base.fingerprint[:16], None, "The same on every machine that runs this recipe."),
    ]


def _data_checks(
    env: str, settings: dict[str, Any], samples: dict[str, int], preview: dict[str, Any], base: Any
) -> list[Check]:
    image = settings["image"]
    checks = [Check("image tokens of a training row", _image_tokens(preview), _expected_image_tokens(image, base), "")]
    if env == "qwen2_vl_2b_coco":
        note = "Fewer: see rejected_samples.csv."
        checks.append(Check("training and test samples", (samples["train"], samples["test"]), COCO_SAMPLES, note))
    first = preview["rows"][0]["text"].replace("\n", "\\n")
    return [*checks, Check("first row", first[:300], None, "System turn, picture, prompt, answer, in this order?")]


def _training_checks(settings: dict[str, Any], summary: dict[str, Any], base: Any) -> list[Check]:
    arguments = settings["training_args"]
    steps = None
    if arguments["max_steps"] < 0 and arguments["per_device_train_batch_size"] != "auto":
        batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
        steps = math.ceil(summary["samples"] / batch) * arguments["num_train_epochs"]
    parameters = trainable_parameters(base.config, settings["lora"]) if settings["vision"] == "frozen" else None
    loss = f"{summary['first_loss']:.3f} → {summary['last_loss']:.3f}"
    speed = f"{summary['seconds']:.0f} s on {summary['device']}, {summary['peak_memory_mb']} MB"
    return [
        Check("optimizer steps", summary["steps"], steps, "62 for the COCO recipe."),
        Check("trainable parameters", summary["trainable_parameters"], parameters, "LoRA on the language model alone."),
        Check("loss", loss, None, "Starts between 1 and 5 and falls. Above 10 the base is not the base it should be."),
        Check("training", speed, None, f"The Qwen2-VL tutorial reports {TUTORIAL_SECONDS} s on 4 A100."),
    ]


def _caption_checks(predictions: Any) -> list[Check]:
    words = {
        side: round(float(predictions[f"{side}_caption"].str.split().str.len().mean()), 1) for side in ("base", "tuned")
    }
    shown = predictions.iloc[0]
    return [
        Check("words per caption, before and after", tuple(words.values()), None, "The base is chatty, COCO is terse."),
        Check("reference", json.loads(shown["references"])[0], None, ""),
        Check("before", shown["base_caption"], None, ""),
        Check("after", shown["tuned_caption"], None, "In the style of the reference, about the same picture?"),
    ]


def _image_tokens(preview: dict[str, Any]) -> int:
    return int(preview["rows"][0]["image_tokens"])


def _expected_image_tokens(image: dict[str, Any], base: Any) -> int | None:
    vision, sides = base.config["vision_config"], (image["resized_height"], image["resized_width"])
    token = vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2)  # px
    return math.prod(round(side / token) for side in sides) if all(sides) else None


def trainable_parameters(config: dict[str, Any], lora: dict[str, Any]) -> int | None:
    """LoRA's parameters on a language model of this shape: r (inputs + outputs) for each projection."""
    text = config.get("text_config", config)
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    head = text.get("head_dim", hidden // text["num_attention_heads"])
    queries, grouped = head * text["num_attention_heads"], head * text["num_key_value_heads"]
    shapes = {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, grouped),
        "v_proj": (hidden, grouped),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    targets = lora["target_modules"]
    layers_differ = "linear_num_value_heads" in text
    if lora["bias"] != "none" or lora["use_dora"] or layers_differ or not set(targets) <= set(shapes):
        return None
    return text["num_hidden_layers"] * sum(lora["r"] * sum(shapes[name]) for name in targets)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="a folder of conf/")
    parser.add_argument("--params", default="", help="as for kedro run")
    parser.add_argument("--no-run", dest="run", action="store_false", help="compare what the newest run left")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
