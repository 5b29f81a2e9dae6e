"""What a run looks like in SwanLab: its curves, its metrics and its pictures. Knows neither Kedro nor torch."""
