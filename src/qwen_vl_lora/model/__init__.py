"""The base model on disk, its processor, and LoRA around it."""
