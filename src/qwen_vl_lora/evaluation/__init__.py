"""Captions of the held-out images: generation, metrics against references, reports."""
