"""LoRA fine-tuning of Qwen2-VL and Qwen2.5-VL on image captions, as a Kedro project."""

__version__ = "0.1.0"
