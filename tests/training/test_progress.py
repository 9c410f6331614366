"""The picture of a run's loss."""

from __future__ import annotations

from typing import Any

from gptj.training.progress import draw_curve


def test_the_curve_names_the_run_and_has_the_tasks_metric() -> None:
    history: list[dict[str, float | None]] = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.0},
        {"step": 2, "evaluation_loss": 1.2, "evaluation_accuracy": 0.75, "evaluation_f1": 0.7},
    ]
    figure = draw_curve(history, "reviews")
    losses, metric = figure.axes
    assert losses.get_title() == "reviews: accuracy 0.75 after step 2"
    assert (losses.get_ylabel(), metric.get_ylabel()) == ("loss", "accuracy")
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == ["training loss", "evaluation loss", "accuracy"]
    assert metric.lines[0].get_ydata() == [0.75]


def test_the_curve_of_a_run_without_numbers_is_empty() -> None:
    """A perplexity that a float cannot hold is None in a history."""
    empty: list[Any] = [[], [{"step": 1, "evaluation_perplexity": None}]]
    for history in empty:
        (axes,) = draw_curve(history, "new").axes
        assert axes.get_title() == "new" and not axes.lines
