"""Runs `transformers serve` in a warm process of the tests, without the command's look for a newer version."""

from transformers.cli.transformers import app

app()
