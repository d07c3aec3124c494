"""What the expert of BaDExpert owes to forgetting: networks that forget nothing, and its course step by step."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchfolio.backdoor.badexpert import BaDExpert
from torchfolio.backdoor.metrics import accuracy_of, auroc, labels_of
from torchfolio.engine import StepRecorder
from torchfolio.engine.recipes import adam
from torchfolio.experiments._backdoors import Pair
from torchfolio.measure import outputs
from torchfolio.runs import Run


def without_forgetting(
    run: Run[Any], net: nn.Module, trusted: Pair, test: Pair, attacked: Any, expert: BaDExpert
) -> dict[str, float]:
    """As many steps at the same rate on right labels, and none: confidence of those networks in the label as a score.

    A network is surer of its trigger than of most clean inputs, and gentle finetuning on clean examples widens that
    whatever their labels are, so a high AUROC here says that this score owes little to the forgetting.
    """
    finetuned = copy.deepcopy(net)
    run.fit(
        finetuned, trusted, optimizer=adam(lr=expert.unlearn_lr_), max_steps=expert.history_[-1][0],
        batch_size=run.settings.unlearn_batch, progress=False,
    )  # fmt: skip
    triggered, target = attacked.tensors()
    said, said_bad = labels_of(net, test[0]), labels_of(net, triggered)
    clean, bad = (
        (test[0][said == test[1]], said[said == test[1]]),
        (triggered[said_bad == target], target[said_bad == target]),
    )

    def confidence(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        if not len(x):  # no attack that succeeds, and an AUROC of NaN
            return torch.zeros(0)
        return outputs(model, x).double().softmax(1).gather(1, labels[:, None])[:, 0]

    return {f"auroc_{name}": auroc(confidence(model, *clean), confidence(model, *bad))
            for name, model in (("control", finetuned), ("network", net))}  # fmt: skip


def step_by_step(
    run: Run[Any], net: nn.Module, trusted: Pair, test: Pair, attacked: Any, lr: float
) -> dict[str, list[float]]:
    """Accuracy and attack success of the expert, step by step, without a stop."""
    settings = run.settings
    x, y = (t[: settings.traced] for t in test)
    bad, target = (t[: settings.traced] for t in attacked.tensors())
    trace = StepRecorder(
        {
            "acc": lambda state: accuracy_of(state.model, x, y),
            "asr": lambda state: accuracy_of(state.model, bad, target),
        },
        every=1,
    )
    wrong = (trusted[1] + 1) % int(outputs(net, x[:1]).shape[1])
    run.fit(
        copy.deepcopy(net), (trusted[0], wrong), optimizer=adam(lr=lr), epochs=2, batch_size=settings.unlearn_batch,
        callbacks=[trace], progress=False,
    )  # fmt: skip
    return {f"trace_{name}": [row[name] for row in trace.rows] for name in ("acc", "asr")}
