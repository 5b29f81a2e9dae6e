"""The `qwen-vl-lora` subcommands, one module each, imported when called."""
