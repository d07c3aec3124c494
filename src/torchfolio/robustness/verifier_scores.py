"""Verifiers asked about a benchmark, those of other programs too, and what they got wrong."""

from __future__ import annotations

import copy
import csv
import shlex
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchfolio.errors import TorchfolioError
from torchfolio.robustness.attack_base import attacked
from torchfolio.robustness.attacks import pgd
from torchfolio.robustness.benchmark_files import Benchmark, Instance
from torchfolio.robustness.properties import Box, Property, Status, Verdict, Verifier, classification
from torchfolio.shown import Shown

if TYPE_CHECKING:
    import pandas as pd


WORDS: dict[str, Status] = {
    "unsat": "verified", "verified": "verified", "holds": "verified", "safe": "verified",
    "sat": "falsified", "falsified": "falsified", "violated": "falsified", "unsafe": "falsified",
    "timeout": "unknown", "unknown": "unknown", "error": "unknown",
}  # fmt: skip


def status_of(word: str) -> Status:
    """What a result of VNN-COMP means. Whole words alone count: "unsat" is not "sat", "unsafe" not "safe".

    Raises:
        ValueError: on another word.
    """
    status = WORDS.get(word.strip().lower())
    if status is None:
        raise ValueError(f"expected a result among {', '.join(WORDS)}, got {word!r}")
    return status


class AttackOnly(Shown):
    """The straw man: says "verified" when PGD finds nothing. Unsound.

    Args:
        steps: number of steps of PGD.
        restarts: number of restarts of PGD.
        alpha: step size over the radius.
        seed: seed of the starts.
    """

    name = "attack only"

    def __init__(self, steps: int = 100, restarts: int = 100, alpha: float = 0.1, seed: int = 0) -> None:
        self.steps, self.restarts, self.alpha, self.seed = steps, restarts, alpha, seed

    def verify(self, model: nn.Module, lower: Tensor, upper: Tensor, label: int, timeout: float = 60.0) -> Verdict:
        """Attack the box around its centre; boxes that are cut on one side are attacked around their middle."""
        started = time.perf_counter()
        center, radius = (lower + upper) / 2, (upper - lower) / 2

        def scaled(u: Tensor) -> Tensor:
            return model((center + radius * u).to(center))

        zeros = torch.zeros_like(center)[None]
        with attacked(model):
            attack = pgd(
                scaled, zeros, torch.tensor([label], device=center.device), eps=1.0, alpha=self.alpha, steps=self.steps,
                restarts=self.restarts, generator=torch.Generator(center.device).manual_seed(self.seed),
            )  # fmt: skip
        witness = torch.minimum(torch.maximum(center + radius * attack.x_adv[0], lower), upper)
        seconds = time.perf_counter() - started
        return Verdict("falsified", witness, seconds) if bool(attack.success[0]) else Verdict("verified", None, seconds)


class CommandVerifier(Shown):
    """A verifier that is a program.

    Args:
        command: command with `{onnx}`, `{vnnlib}` and `{timeout}`; no shell runs it. The last line of its output that
            is a result word counts.

    Example:
        >>> CommandVerifier("python verify.py --net {onnx} --spec {vnnlib} --timeout {timeout}")
    """

    name = "command"

    def __init__(self, command: str) -> None:
        self.command = command

    def run(self, instance: Instance, timeout: float) -> Verdict:
        """Ask about one instance."""
        words = [
            part.format(onnx=instance.onnx, vnnlib=instance.vnnlib, timeout=f"{timeout:g}")
            for part in shlex.split(self.command)
        ]
        started = time.perf_counter()
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=1.5 * timeout + 5, check=False)
        except subprocess.TimeoutExpired:
            return Verdict("unknown", None, time.perf_counter() - started)
        except OSError as error:
            raise TorchfolioError(f"the verifier {words[0]} cannot be run: {error}") from error
        said = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
        known = [word for word in said if word.lower() in WORDS]
        if not known:
            raise TorchfolioError(
                f"the verifier printed no result (exit code {done.returncode}): {done.stdout[-200:]!r}"
            )
        return Verdict(status_of(known[-1]), None, time.perf_counter() - started)


def run_verifier(benchmark: Benchmark, verifier: Any, timeout: float | None = None) -> pd.DataFrame:
    """Ask a verifier about every instance.

    Args:
        benchmark: benchmark of `load`.
        verifier: object with `decide(model, box, property, timeout)`, as those of `torchfolio.robustness.verifiers`; or
            a `Verifier`, for properties of classifiers; or a `CommandVerifier`.
        timeout: seconds, in place of the instances' own.

    Returns:
        A row for each instance: `instance`, `model`, `kind`, `status`, `witness` (`"valid"`, `"invalid"`, `"none"`),
        `seconds`, `boxes`. A claim of "falsified" counts as "unknown" where its witness is missing or false; programs
        give no witness, and their claims stand.
    """
    import pandas as pd

    rows = []
    for i, instance in enumerate(benchmark):
        limit = instance.timeout if timeout is None else timeout
        if isinstance(verifier, CommandVerifier):
            verdict, witness = verifier.run(instance, limit), "none"
        else:
            verdict, witness = _asked(instance, verifier, limit)
        rows.append(
            {"instance": i, "model": instance.onnx.stem, "kind": instance.kind, "status": verdict.status,
             "witness": witness, "seconds": verdict.seconds, "boxes": verdict.boxes}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _asked(instance: Instance, verifier: Any, timeout: float) -> tuple[Verdict, str]:
    """The verdict on all boxes of an instance, its witness checked."""
    net, pairs = instance.read()
    seconds, boxes, unknown = 0.0, 0, False
    for box, prop in pairs:
        verdict = _decide(verifier, net, box, prop, timeout)
        seconds, boxes = seconds + verdict.seconds, boxes + verdict.boxes
        if verdict.status == "falsified":
            if _is_witness(net, box, prop, verdict.witness):
                return Verdict("falsified", verdict.witness, seconds, boxes), "valid"
            return Verdict("unknown", None, seconds, boxes), "invalid"
        unknown |= verdict.status == "unknown"
    return Verdict("unknown" if unknown else "verified", None, seconds, boxes), "none"


def _decide(verifier: Any, net: nn.Module, box: Box, prop: Property, timeout: float) -> Verdict:
    if hasattr(verifier, "decide"):
        return verifier.decide(net, box, prop, timeout)
    if not isinstance(verifier, Verifier):
        raise TypeError(f"expected a verifier with decide or verify, got {type(verifier).__name__}")
    label, classes = int(prop.C[0].argmax()), prop.C.shape[1]
    if not torch.equal(prop.C.sort(0).values, classification(label, classes).C.sort(0).values):
        raise ValueError(f"{type(verifier).__name__} decides properties of classifiers alone")
    narrow = box.to(torch.float32)
    return verifier.verify(net, narrow.lower[0], narrow.upper[0], label, timeout)


@torch.no_grad()
def _is_witness(net: nn.Module, box: Box, prop: Property, witness: Tensor | None) -> bool:
    if witness is None:
        return False
    point = witness.double()[None]
    # Boxes are read in float64 and may have been rounded outward on their way to a verifier in float32.
    wide = box.to(torch.float32).to(torch.float64)
    return bool(wide.contains(point).all() and prop.violated(copy.deepcopy(net).double()(point))[0])


def score(benchmark: Benchmark, verifier: Any, timeout: float | None = None) -> pd.DataFrame:
    """Score a verifier.

    Args:
        benchmark: benchmark of `load`.
        verifier: verifier of `run_verifier`; or the results of one: a table of it, or a CSV file whose rows are, as in
            VNN-COMP, one result word per instance in their order (the last field that is such a word).
        timeout: seconds, see `run_verifier`.

    Returns:
        A row per network: shares of clean instances `clean_verified`, `clean_falsified`, of those with a hidden
        counterexample `unverifiable_verified`, `unverifiable_falsified`, and `unsound`: whether any of the latter was
        called verified. To falsify a clean instance is no error: nobody knows whether it holds.
    """
    import pandas as pd

    if isinstance(verifier, pd.DataFrame):
        table = verifier
    elif isinstance(verifier, str | Path):
        table = _results(benchmark, Path(verifier))
    else:
        table = run_verifier(benchmark, verifier, timeout)

    rows = []
    for name in dict.fromkeys(table["model"].tolist()):
        part = table[table["model"] == name]
        kinds, said = part["kind"].tolist(), part["status"].tolist()
        row: dict[str, Any] = {"model": name}
        for kind in ("clean", "unverifiable"):
            of_kind = [status for k, status in zip(kinds, said, strict=True) if k == kind]
            for status in ("verified", "falsified"):
                row[f"{kind}_{status}"] = of_kind.count(status) / len(of_kind) if of_kind else float("nan")
        wrong = [k == "unverifiable" and status == "verified" for k, status in zip(kinds, said, strict=True)]
        rows.append({**row, "unsound": any(wrong), "seconds": float(sum(part["seconds"].tolist()))})
    return pd.DataFrame(rows).set_index("model")


def _results(benchmark: Benchmark, path: Path) -> pd.DataFrame:
    """Results from a file, one row per instance."""
    import pandas as pd

    with path.open(newline="") as file:
        lines = [row for row in csv.reader(file) if row]
    if len(lines) != len(benchmark):
        raise ValueError(f"expected {len(benchmark)} results in {path}, got {len(lines)}")
    rows = []
    for i, (line, instance) in enumerate(zip(lines, benchmark, strict=True)):
        known = [cell for cell in line if cell.strip().lower() in WORDS]
        if not known:
            raise ValueError(f"row {i + 1} of {path} has no result word: {', '.join(line)}")
        rows.append(
            {"instance": i, "model": instance.onnx.stem, "kind": instance.kind, "status": status_of(known[-1]),
             "witness": "none", "seconds": float("nan"), "boxes": 0}
        )  # fmt: skip
    return pd.DataFrame(rows)
