"""Rows, batches and the training loop."""
