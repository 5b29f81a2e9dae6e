"""LoRA fine-tuning of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 on image captions, as a Kedro project."""

import sys

__version__ = "0.1.0"

if sys.platform == "win32":  # locks and process groups are POSIX
    raise SystemExit("qwen-vl-lora runs on Linux and macOS. On Windows, install and run it in WSL (`wsl --install`).")
