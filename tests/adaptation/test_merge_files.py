"""Merging from file to file gives what merging in memory gives."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchfolio.adaptation.merge_files import average_files, task_arithmetic_files
from torchfolio.adaptation.weights import average, task_arithmetic


def network(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = nn.Sequential(nn.Linear(700, 600), nn.BatchNorm1d(600), nn.Linear(600, 3)).state_dict()
    state["half"] = torch.randn(5).bfloat16()
    state["scalar"] = torch.randn(())
    state["none"] = torch.zeros(0, 3)
    state["whole"] = torch.arange(4)
    return {name: value.clone() + (seed if value.is_floating_point() else 0) for name, value in state.items()}


@pytest.fixture
def files(tmp_path):
    states = [network(seed) for seed in range(3)]
    for k, state in enumerate(states):
        save_file(state, tmp_path / f"{k}.safetensors")
    return states, [tmp_path / f"{k}.safetensors" for k in range(3)]


def same(path, wanted):
    found = load_file(path)
    assert list(found) == sorted(wanted) or set(found) == set(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_as_in_memory(files, tmp_path):
    states, paths = files
    same(average_files(paths, tmp_path / "mean.safetensors"), average(states))
    for weight in (0.3, [0.2, -0.5]):
        out = task_arithmetic_files(paths[0], paths[1:], tmp_path / "sum.safetensors", weight)
        same(out, task_arithmetic(states[0], states[1:], weight))
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "sum.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".new-")]


def test_over_one_of_the_inputs(files):
    states, paths = files
    average_files(paths, paths[1])
    same(paths[1], average(states))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("half"), r"1\.safetensors lacks half"),
        (lambda s: s.update(more=torch.ones(1)), r"1\.safetensors adds more"),
        (lambda s: s.update(half=torch.ones(6)), r"half of shape \[6\], expected \[5\]"),
        (lambda s: s["2.weight"].fill_(float("nan")), r"checkpoint 1 holds NaN or infinity in 2\.weight"),
    ],
)
def test_what_does_not_fit_leaves_no_file(files, tmp_path, change, said):
    states, paths = files
    change(states[1])
    save_file(states[1], paths[1])
    with pytest.raises(ValueError, match=said):
        average_files(paths, tmp_path / "out.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == [p.name for p in paths]


def test_what_is_no_file_of_tensors(files, tmp_path):
    _, paths = files
    (tmp_path / "junk").write_bytes(b"junk" * 10)
    with pytest.raises(ValueError, match="junk cannot be read as a safetensors file"):
        average_files([paths[0], tmp_path / "junk"], tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="at least 2 files"):
        average_files(paths[:1], tmp_path / "out.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        task_arithmetic_files(tmp_path / "absent", paths, tmp_path / "out.safetensors")
