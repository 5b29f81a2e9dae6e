"""The training curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure


def plot_training_curves(training_log: pd.DataFrame) -> Figure:
    """Loss and validation loss on the left axis, learning rate on the right, over optimizer steps."""
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for column, name in (("loss", "loss"), ("validation_loss", "validation loss")):
        seen = training_log.dropna(subset=[column])
        figure.add_trace(Scatter(x=seen["step"], y=seen[column], mode="lines+markers", name=name))
    seen = training_log.dropna(subset=["learning_rate"])
    figure.add_trace(
        Scatter(x=seen["step"], y=seen["learning_rate"], name="learning rate", yaxis="y2", line={"dash": "dot"})
    )
    figure.update_layout(
        xaxis_title="optimizer step",
        yaxis={"title": "loss per answer token (nats)", "rangemode": "tozero"},
        yaxis2={"title": "learning rate", "overlaying": "y", "side": "right", "showgrid": False},
        legend={"orientation": "h", "y": 1.1},
        margin={"l": 60, "r": 60, "t": 40, "b": 50},
    )
    return figure
