"""A page to try adapters on single pictures."""
