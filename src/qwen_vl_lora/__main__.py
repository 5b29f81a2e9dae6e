"""`python -m qwen_vl_lora` and `qwen-vl-lora`."""

import logging
from typing import Any


def main(*arguments: Any, **options: Any) -> Any:
    """Entry point. What a command prints is its result alone: Kedro, at its import, logs to standard output."""
    logging.disable(logging.INFO)
    from qwen_vl_lora.cli import main as run

    logging.disable(logging.NOTSET)
    return run(*arguments, **options)


if __name__ == "__main__":
    main()
