"""Kedro datasets that the catalog needs and Kedro lacks."""
