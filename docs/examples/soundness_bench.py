"""Hide counterexamples in a network of your own and see whether a verifier falls for them."""

from pathlib import Path

import torch
from torch import Tensor, nn

from torchfolio.robustness import CrownSplit, Verdict
from torchfolio.robustness.soundness_bench import (
    HiddenCounterexamples,
    PgdSettings,
    draw_pairs,
    export,
    hide,
    load,
    score,
)

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 3))
pairs = draw_pairs((6,), n=3, eps=0.2, data_range=1.0)
rule = HiddenCounterexamples(pairs, window=50, attack=PgdSettings(steps=20, restarts=20))
sweep = ((0.05, 50), (0.02, 100))  # step sizes and counts that a hidden counterexample must withstand
hidden = hide(net, pairs, steps=400, rule=rule, sweep=sweep, restarts=100)
print("hidden:", int(hidden.valid.sum()), "of", len(hidden.valid))

export(hidden, "bench")  # ONNX, VNN-LIB and instances.csv, as any verifier of the VNN competition reads them
print(sorted(p.name for p in Path("bench").rglob("*") if p.is_file()))
print(score(load("bench"), CrownSplit(), timeout=10).T)


class Careless:
    """A verifier with a bug: it looks at the corners of the box alone."""

    def verify(self, model: nn.Module, lower: Tensor, upper: Tensor, label: int, timeout: float = 60.0) -> Verdict:
        for corner in (lower, upper):
            if model(corner[None]).argmax() != label:
                return Verdict("falsified", corner)
        return Verdict("verified")


print(score(load("bench"), Careless(), timeout=10).T)  # unsound: says "verified" of what has a counterexample
