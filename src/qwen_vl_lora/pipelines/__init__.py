"""Wiring only: each folder is one pipeline, each node one library call."""
