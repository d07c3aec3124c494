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
