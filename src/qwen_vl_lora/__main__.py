"""`python -m qwen_vl_lora` and `qwen-vl-lora`."""

from qwen_vl_lora.cli import main

if __name__ == "__main__":
    main()
