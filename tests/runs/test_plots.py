"""Pictures over seeds: what stands where."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from torchfolio.runs import plots
from torchfolio.runs.outcome import Results

RESULTS = Results(
    settings=None,
    seeds=(0, 1),
    arms=(
        {"ours": {"clean": 0.9, "attacked": 0.5}, "theirs": {"clean": 0.8}},
        {"ours": {"clean": 0.7, "attacked": 0.3}, "theirs": {"clean": 0.6}},
    ),
)


def test_groups_stand_side_by_side_at_their_places():
    series = {
        "clean": {"A": ("ours", "clean"), "B": ("theirs", "clean")},
        "attacked": {"A": ("ours", "attacked")},  # nothing of B
    }
    fig = plots.groups(RESULTS, series, ylabel="accuracy")
    ax = fig.axes[0]
    clean, attacked = ax.containers
    assert [bar.get_height() for bar in clean] == pytest.approx([0.8, 0.7])
    assert [bar.get_height() for bar in attacked] == pytest.approx([0.4])
    assert [bar.get_x() + bar.get_width() / 2 for bar in clean] == pytest.approx([-0.2, 0.8])
    assert attacked[0].get_x() + attacked[0].get_width() / 2 == pytest.approx(0.2)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["A", "B"]
    dots = ax.lines[0].get_xydata()
    assert dots == pytest.approx(np.array([[-0.2, 0.9], [0.8, 0.8], [-0.2, 0.7], [0.8, 0.6]]))
    plt.close(fig)


@pytest.fixture
def results():
    """Two seeds of two arms."""
    one = {"a": {"score": 1.0, "cost": 10.0, "curve": [1.0, 2.0]}, "b": {"score": 3.0, "cost": 20.0}}
    two = {"a": {"score": 3.0, "cost": 12.0, "curve": [3.0, 4.0]}, "b": {"score": 5.0, "cost": 22.0}}
    yield Results(None, (0, 1), (one, two))
    plt.close("all")


def test_a_line_is_one_value_or_a_number_of_every_arm(results):
    fig = plots.curves(
        results,
        {"one": ("a", "curve"), "arms": [("a", "score"), ("b", "score")]},
        x=[5, 7],
        levels={"b": ("b", "cost")},
    )
    one, arms, level = fig.axes[0].lines
    assert one.get_ydata().tolist() == [2.0, 3.0]
    assert arms.get_xdata().tolist() == [5.0, 7.0]
    assert arms.get_ydata().tolist() == [2.0, 4.0]
    assert list(level.get_ydata()) == [21.0, 21.0]
    legend = fig.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["one", "arms", "b"]


def test_scatter_shows_seeds_and_their_mean(results):
    one, other = (("a", "cost"), ("a", "score")), (("b", "cost"), ("b", "score"))
    ax = plots.scatter(results, {"one": one, "line": [one, other]}).axes[0]
    dots, mean, first, second, line = ax.lines
    assert [dots.get_xdata().tolist(), mean.get_xdata().tolist()] == [[10.0, 12.0], [11.0]]
    assert [dots.get_ydata().tolist(), mean.get_ydata().tolist()] == [[1.0, 3.0], [2.0]]
    assert [first.get_xdata().tolist(), second.get_ydata().tolist()] == [[10.0, 12.0], [3.0, 5.0]]
    assert [line.get_xdata().tolist(), line.get_ydata().tolist()] == [[11.0, 21.0], [2.0, 4.0]]


def test_matrices_share_a_scale_and_leave_cells_of_nan_empty():
    fig = plots.matrices({"a": [[0.0, np.nan], [1.0, 2.0]], "b": [[4.0]]}, digits=1)
    one, other = fig.axes
    assert [text.get_text() for text in one.texts] == ["0.0", "1.0", "2.0"]
    assert [text.get_text() for text in other.texts] == ["4.0"]
    assert one.images[0].get_clim() == other.images[0].get_clim() == (0.0, 4.0)
    plt.close(fig)
    bare = plots.matrices({"a": np.eye(3)}, digits=None)
    assert not bare.axes[0].texts
    plt.close(bare)
