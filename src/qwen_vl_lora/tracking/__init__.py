"""Trackers, which show a run's curves, metrics and pictures elsewhere. Imports neither Kedro nor torch."""
