"""Captions of the held-out images: generated, scored against their references, and shown."""
