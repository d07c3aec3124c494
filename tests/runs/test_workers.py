"""Seeds measured in other processes: what is asked of them, and when a run is concluded."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from torchfolio import processes
from torchfolio.engine import devices
from torchfolio.runs import plan, run_all, run_experiment, workers

from . import slow_toy, toy


def test_a_run_is_concluded_while_others_are_measured(tmp_path):
    """Pictures of many papers would wait for each other where all are drawn at the end."""
    fast = plan(toy, "quick", (0, 1), device="cpu", out=tmp_path)
    slow = plan(slow_toy, "quick", (0, 1, 2), {"seconds": 0.7}, device="cpu", out=tmp_path)
    concluded: dict[str, bool] = {}

    def say(text: str) -> None:
        concluded[text] = (fast.folder / "outcome.json").is_file()

    first, second = run_all([fast, slow], jobs=2, say=say)
    assert concluded["slow_toy seed 2: done"]
    assert (first.slug, first.status, second.slug, second.status) == ("toy", "done", "slow_toy", "done")
    assert [path.name for path in sorted((fast.folder / "figures").iterdir())] == ["mean_curve.png", "mean_curve.svg"]


def test_a_seed_that_fails_among_good_ones(tmp_path):
    settings = {"name": "broken at 1"}
    one, two = (
        run_experiment(toy, "quick", (0, 1, 2), settings, out=tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2)
    )
    assert two.status == one.status == "failed"
    assert two.error == one.error
    assert two.claims == one.claims
    assert two.arms == one.arms == {}
    assert list(tmp_path.glob("2/toy/*/seed-2/arms/ours.json")), "the others are measured and kept"


class _Asked(Exception):
    """How processes were to be made."""


@pytest.mark.parametrize(("device", "method"), [("cuda", "spawn"), ("mps", "spawn"), ("cpu", "forkserver")])
def test_workers_that_use_an_accelerator_are_not_forked(tmp_path, monkeypatch, device, method):
    def get_context(name: str) -> None:
        raise _Asked(name)

    job = plan(toy, "quick", (0,), device="cpu", out=tmp_path)
    monkeypatch.setattr(processes, "FORKS", True)
    monkeypatch.setattr(processes, "get_context", get_context)
    monkeypatch.setattr(workers, "import_ahead", lambda modules: None)
    monkeypatch.setattr(devices, "resolve_device", lambda name: torch.device(device))
    with pytest.raises(_Asked, match=method):
        run_all([job], jobs=2)


def test_spawned_workers_give_what_forked_ones_give(tmp_path, monkeypatch):
    forked = run_experiment(toy, "quick", (0,), device="cpu", out=tmp_path / "forked", jobs=2)
    monkeypatch.setattr(processes, "FORKS", False)
    spawned = run_experiment(toy, "quick", (0,), device="cpu", out=tmp_path / "spawned", jobs=2)
    assert forked.arms == spawned.arms
    assert spawned.status == "done"


class _Ray(ModuleType):
    """As much of Ray as is called here; tasks run at once."""

    exceptions = SimpleNamespace(RayError=RuntimeError)

    def __init__(self) -> None:
        super().__init__("ray")
        self.asked: list[dict[str, int]] = []
        self.devices: list[str] = []

    def is_initialized(self) -> bool:
        return True

    def remote(self, **options: int):
        self.asked.append(options)
        return lambda function: SimpleNamespace(remote=lambda job, seed: self.devices.append(job.device) or seed)

    def wait(self, tasks, num_returns):
        return tasks[:num_returns], tasks[num_returns:]

    def get(self, task):
        raise RuntimeError("the worker died")


@pytest.mark.parametrize(("device", "gpus"), [("cpu", 0), ("cuda", 1)])
def test_tasks_of_ray_ask_for_the_gpu_that_they_use(tmp_path, monkeypatch, device, gpus):
    ray = _Ray()
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(devices, "resolve_device", lambda name: torch.device(device))
    job = plan(slow_toy, "quick", (0,), {"seconds": 0}, out=tmp_path)
    said: list[str] = []
    workers.measure_on_ray([job], lambda job, seed, result: said.append(f"{seed}: {result}"))
    assert ray.asked == [{"num_cpus": 1, "num_gpus": gpus}]
    assert ray.devices == [device], "auto is what the command found, for the record says so"
    assert said == ["0: the worker died"]


def test_a_device_that_is_not_there_is_told_before_there_is_a_folder(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match="there is no device 'cuda' here"):
        run_experiment(toy, "quick", (0,), device="cuda", out=tmp_path, jobs=2)
    assert not list(tmp_path.iterdir())
