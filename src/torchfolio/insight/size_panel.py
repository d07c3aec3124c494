"""Whether the size of a network may sit at a peak of the test error: what one network tells of it, and what it cannot.

Test error over size peaks where a model can just fit its training examples: for least squares on P features at P = N, for K
outputs at as many numbers to fit as weights. See `double_descent` for models in which this is exact.

Reference:
    Belkin et al., Reconciling Modern Machine-Learning Practice and the Classical Bias-Variance Trade-off, PNAS 2019.
"""

from __future__ import annotations

from torch import Tensor, nn

from torchfolio.checks import whole
from torchfolio.insight.training_record import losses_of
from torchfolio.measure import Panel, outputs

__all__ = ["size_panel"]

FITTED = 0.05  # share of the held-out loss below which the training examples count as fitted
ACCURATE = 0.99


def size_panel(
    model: nn.Module, seen: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], count: int | None
) -> Panel:
    """The panel.

    Args:
        model: network, left as it was.
        seen: some examples that it was trained on.
        held_out: examples that it was not trained on.
        count: number of training examples N, where it is known.

    Raises:
        ValueError: if the outputs do not fit the targets.
    """
    import pandas as pd

    rows = {}
    for name, (x, y) in (("training", seen), ("held out", held_out)):
        answers = outputs(model, (x, y)).double()
        labels = not y.is_floating_point()
        rows[name] = {"examples": len(y), "loss": float(losses_of(answers, y if labels else y.double()).mean())}
        if labels:
            rows[name]["accuracy"] = float((answers.argmax(1) == y).double().mean())
    table = pd.DataFrame(rows).T.rename_axis("part")
    table["examples"] = table["examples"].astype(int)
    numbers = answers[0].numel()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    accuracy = rows["training"].get("accuracy")
    fitted = rows["training"]["loss"] <= FITTED * rows["held out"]["loss"] or (
        accuracy is not None and accuracy >= ACCURATE
    )
    sentences = []
    ratio = None
    if count is not None:
        ratio = parameters / (whole("count", count, 1) * numbers)
        sentences.append(
            f"It has {parameters:,} trained parameters for {count:,} examples with {numbers} output{'s' * (numbers > 1)} each, "
            f"{ratio:.3g} for every number that it has to fit. Models that are linear in their parameters have the peak at 1; "
            "trained networks have it where they just reach a training error of 0, mostly below 1."
        )
    else:
        sentences.append(
            f"It has {parameters:,} trained parameters; on how many examples it was trained is not recorded."
        )
    if not fitted:
        sentences.append("It does not fit its training examples: it is left of the peak, or was stopped before it got there, and a larger network need not fear it.")  # fmt: skip
    elif ratio is not None and ratio < 10:
        sentences.append("It fits its training examples and has few parameters more than that takes: it may sit at the peak. Try one of half the width and one of twice the width, weight decay, or stopping earlier.")  # fmt: skip
    else:
        sentences.append("It fits its training examples with many parameters to spare: it is most likely to the right of the peak, where more width lowers the error again.")  # fmt: skip
    notes = ["One network cannot tell where the peak is: torchfolio.insight.capacity_sweep trains your networks of several sizes and finds it."]  # fmt: skip
    record = {"parameters": parameters, "ratio": ratio, "fitted": bool(fitted), "parts": rows}
    return Panel("May its size sit at a peak of the test error?", sentences, notes, [table], record=record, eyebrow="double descent")  # fmt: skip
