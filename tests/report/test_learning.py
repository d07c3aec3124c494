"""The learning curve of a bundle."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from torchfolio.report.learning import learning_card


def test_curve_says_where_the_best_epoch_was(tmp_path):
    text = "epoch,loss,val_loss,val_accuracy,seconds\n1,2.0,1.5,.5,1\n2,1.0,0.5,.8,1\n3,0.5,,,1\n4,.1,0.75,.7,1\n"
    (tmp_path / "history.csv").write_text(text)
    card = learning_card(tmp_path, "net")
    assert card is not None
    assert card.sentences == [
        "4 epochs, 4.0 s.",
        "The lowest validation loss, 0.5, is that of epoch 2, which the last one, 0.75, no longer has.",
    ]
    loss, accuracy = card.pictures[0].figure.axes  # type: ignore[union-attr]
    assert [list(line.get_xdata()) for line in loss.lines] == [[1, 2, 3, 4], [1, 2, 4]]
    assert list(accuracy.lines[0].get_ydata()) == [0.5, 0.8, 0.7]
    plt.close(card.pictures[0].figure)


def test_no_history_is_no_card(tmp_path):
    assert learning_card(tmp_path, "net") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "epoch,loss\n",
        "loss\n1\n",
        "epoch,loss\n1,two\n",
        "epoch,loss\n1,2,3\n",
        "epoch,loss\n1\n",
        "epoch\nnan\n",
        "\x00",
    ],
)
def test_a_history_that_cannot_be_read_says_so(tmp_path, text):
    (tmp_path / "history.csv").write_text(text)
    card = learning_card(tmp_path, "net")
    assert card is not None
    assert card.eyebrow == "not shown"
    assert not card.pictures


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    (tmp_path / "history.csv").write_text("epoch,loss,val_loss\n1,nan,inf\n2,nan,inf\n")
    card = learning_card(tmp_path, "net")
    assert card is not None
    assert not card.pictures
