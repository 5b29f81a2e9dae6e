"""workspace ─► build_base_model ─► tiny_base ─► measure_base_model ─► tiny_base_quality"""

from __future__ import annotations

from kedro.pipeline import Pipeline, node, pipeline

from qwen_vl_lora.pipelines.base_model.nodes import build_base_model, measure_base_model


def create_pipeline() -> Pipeline:
    """Pre-train the tiny base, publish it, and measure what was published."""
    return pipeline(
        [
            node(build_base_model, inputs="workspace", outputs="tiny_base", name="build_base_model"),
            node(measure_base_model, inputs="tiny_base", outputs="tiny_base_quality", name="measure_base_model"),
        ]
    )
