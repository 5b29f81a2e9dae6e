"""Which run made which version of what, from which versions of what. Knows neither Kedro nor torch."""
