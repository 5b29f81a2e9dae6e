"""Stored image features: what the frozen vision tower makes of each picture, computed once."""
