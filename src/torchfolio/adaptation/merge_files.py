"""Merging checkpoints that lie in safetensors files, one tensor at a time.

Inputs are mapped into memory and the output is written as it comes, so that a network may be larger than memory: beside the
pages of the files one tensor is held, that which is being added up.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from torchfolio.adaptation.weights import (
    NOTHING,
    STATISTICS,
    Weights,
    added,
    average_of,
    buffer_names,
    check_frozen,
    check_sum,
    coefficients,
    frozen_names,
    real,
)

__all__ = ["average_files", "task_arithmetic_files"]

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
"""Names of element types in safetensors files."""
TYPES = {code: dtype for dtype, code in CODES.items()}


def average_files(paths: Sequence[str | Path], output: str | Path, *, like: nn.Module | None = None) -> Path:
    """The plain mean of checkpoints, see `torchfolio.adaptation.weights.average`, from file to file.

    Args:
        paths: two or more safetensors files with the same tensors. What is not floating point is taken from the first.
        output: file to write; one that is there is replaced when the new one is whole.
        like: module of these entries, on any device, whose buffers may hold infinity where all files hold the same.

    Returns:
        The path of the output.

    Raises:
        ValueError: if files hold other names or shapes than the first, NaN or infinity, or cannot be read.
    """
    if len(paths) < 2:
        raise ValueError(f"expected at least 2 files, got {len(paths)}")
    buffers = buffer_names(like)

    def merged(name: str, tensors: list[Tensor]) -> Tensor:
        if not real(tensors[0]):
            return tensors[0]
        return average_of(name, tensors, buffers)

    return _streamed([Path(p) for p in paths], Path(output), merged)


def task_arithmetic_files(
    base: str | Path,
    paths: Sequence[str | Path],
    output: str | Path,
    weight: Weights = 0.3,
    *,
    like: nn.Module | None = None,
) -> Path:
    """$\\theta_0 + \\sum_i \\lambda_i (\\theta_i - \\theta_0)$, see `torchfolio.adaptation.weights.task_arithmetic`, from file to file.

    Args:
        base: safetensors file of the pretrained network. Its integers and running statistics are kept.
        paths: files of its finetuned checkpoints, at least one.
        output: file to write; one that is there is replaced when the new one is whole.
        weight: coefficient $\\lambda$ of every task vector, or one for each.
        like: module of these entries, on any device, whose buffers and frozen parameters stay those of the base.

    Returns:
        The path of the output.

    Raises:
        ValueError: if files hold other names or shapes than the base, NaN or infinity, or cannot be read; if one changed a
            frozen parameter of `like`.
    """
    if not paths:
        raise ValueError("expected at least one finetuned checkpoint, got none")
    frozen = set() if like is None else frozen_names(like)
    trainable = set() if like is None else {n for n, _ in like.named_parameters(remove_duplicate=False)} - frozen
    if like is not None and not trainable:
        raise ValueError(NOTHING)
    factors = coefficients(weight, len(paths), 1)[:, 0].tolist()

    def merged(name: str, tensors: list[Tensor]) -> Tensor:
        first, *others = tensors
        if name in frozen:
            check_frozen(name, first, others)
        kept = name.rpartition(".")[2] in STATISTICS if like is None else name not in trainable
        if kept or not real(first):
            for source, tensor in {"the pretrained network": first, **dict(enumerate(others))}.items():
                if real(tensor) and tensor.isnan().any():
                    raise ValueError(f"{source if tensor is first else f'checkpoint {source}'} holds NaN in {name}")
            return first
        value, finite = added(first, others, factors, subtract=True)
        if not finite:
            check_sum(value, name, {"the pretrained network": first}, others)
        return value

    return _streamed([Path(base), *map(Path, paths)], Path(output), merged)


def _streamed(paths: list[Path], output: Path, merged: Callable[[str, list[Tensor]], Tensor]) -> Path:
    """Write what a function makes of the tensors of every name; types and shapes are those of the first file."""
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in paths]
        names = list(files[0].keys())
        header, size = _header(files, paths, names)
        with tempfile.NamedTemporaryFile("wb", dir=output.parent, prefix=".new-", delete=False) as scratch:
            try:
                scratch.write(header)
                for name in names:
                    value = merged(name, [file.get_tensor(name) for file in files]).contiguous()
                    if value.numel():
                        scratch.write(value.reshape(-1).view(torch.uint8).numpy().data)  # a view: nothing is copied
                if scratch.tell() != len(header) + size:
                    raise ValueError(f"expected {size} bytes of tensors, got {scratch.tell() - len(header)}")
                scratch.flush()
                os.fsync(scratch.fileno())
                os.chmod(scratch.name, 0o666 & ~_umask())
                os.replace(scratch.name, output)
            except BaseException:
                Path(scratch.name).unlink(missing_ok=True)
                raise
    return output


def _opened(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error


def _header(files: list[Any], paths: list[Path], names: list[str]) -> tuple[bytes, int]:
    """The header of the output, and how many bytes follow."""
    entries: dict[str, Any] = {}
    at = 0
    for name in names:
        part = files[0].get_slice(name)
        shape, code = list(part.get_shape()), part.get_dtype()
        if code not in TYPES:
            raise ValueError(f"{paths[0]} has {name} of the type {code}, which is not known")
        end = at + TYPES[code].itemsize * torch.Size(shape).numel()
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [at, end]}
        at = end
    for file, path in zip(files[1:], paths[1:], strict=True):
        there = set(file.keys())
        odd = next((n for n in [*names, *there] if (n in there) != (n in entries)), None)
        if odd is not None:
            raise ValueError(f"{path} {'lacks' if odd in entries else 'adds'} {odd}, beside {paths[0]}")
        for name in names:
            shape = list(file.get_slice(name).get_shape())
            if shape != entries[name]["shape"]:
                raise ValueError(f"{path} has {name} of shape {shape}, expected {entries[name]['shape']}")
    entries = {"__metadata__": {"format": "pt", **(files[0].metadata() or {})}, **entries}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, at


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
