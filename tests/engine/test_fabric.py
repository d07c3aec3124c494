"""What training imports."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys, torch
from torch import nn
from torchfolio.engine import fit
fit(nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)), epochs=1, device="cpu", progress=False)
assert "lightning_fabric" in sys.modules
assert not {"torchmetrics", "transformers", "matplotlib", "pandas"} & set(sys.modules), sorted(sys.modules)
from lightning_fabric.utilities.spike import SpikeDetection
import torchmetrics
SpikeDetection()
"""


def test_training_imports_no_metrics_and_leaves_them_to_others():
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:torchfolio", "-c", CODE], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
