"""Stored image features: the output of the frozen vision tower for each picture, computed once."""
