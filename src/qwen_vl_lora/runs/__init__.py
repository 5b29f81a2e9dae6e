"""Which run made which version of a dataset, and from which versions. Knows neither Kedro nor torch."""
