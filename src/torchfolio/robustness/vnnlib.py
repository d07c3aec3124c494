"""Properties as files: VNN-LIB, in and out.

It is read as VNN-COMP writes it: real constants `X_i` and `Y_j`, and assertions of `<=` and `>=` between them and numbers,
in conjunctions and disjunctions. A file may come from anywhere: what is not understood is refused by its line, and so is
what would take more than `CASES` cases.

Reference: Demarchi et al., "Supporting Standardization of Neural Networks Verification with VNNLIB and CoCoNet", 2023.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchfolio.errors import TorchfolioError
from torchfolio.robustness.properties import Box, Property

__all__ = ["FormatError", "read_vnnlib", "write_vnnlib"]

Atom = tuple[dict[str, float], float]  # sum of coefficients times constants <= bound

DEPTH = 64
"""Parentheses within parentheses, at most."""
CASES = 2**16
"""Cases that the disjunctions of a file multiply to, at most."""
ATOMS = 2**22
"""Inequalities of all cases together, at most."""
ENTRIES = 2**26
"""Numbers of all boxes, or of all rows, at most."""
BYTES = 2**28
"""Length of a file, at most."""
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
CONSTANT = re.compile(r"[XY]_\d{1,9}", re.ASCII)


class FormatError(TorchfolioError, ValueError):
    """A file that is not what it should be."""


class _Form(list["str | _Form"]):
    """A parenthesis: what is in it, and the line on which it opens."""

    def __init__(self, line: int) -> None:
        super().__init__()
        self.line = line


def read_vnnlib(path: str | Path, shape: Sequence[int] | None = None) -> list[tuple[Box, Property]]:
    """Read a property: boxes of inputs, and what would violate it on each.

    A case in which no input lies, as its bounds cross, is left out: nothing in it can violate anything.

    Args:
        path: path of the file.
        shape: shape of one input, which the constants `X_0, X_1, …` fill in order; flat by default.

    Returns:
        Pairs of a box and a property, float64. The whole is violated if any pair is.

    Raises:
        FormatError: if the file is not of this kind, an input has no bounds, an assertion mixes inputs and outputs, a number
            is not finite, or there are more than `CASES` cases.
    """
    return _Reader(path).read(shape)


class _Reader:
    """One file."""

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.names: set[str] = set()

    def _refuse(self, text: str, form: _Form | None = None) -> FormatError:
        return FormatError(f"{self.path}: {text}" if form is None else f"{self.path}, line {form.line}: {text}")

    def read(self, shape: Sequence[int] | None) -> list[tuple[Box, Property]]:
        conjuncts: list[list[list[Atom]]] = []
        for form in self._forms(self._text()):
            head = form[0] if form else None
            if head == "declare-const":
                self._declare(form)
            elif head == "assert" and len(form) == 2:
                conjuncts.append(self._dnf(form[1], form))
            else:
                raise self._refuse(f"expected (declare-const NAME Real) or (assert FORMULA), got {_shown(form)}", form)
        inputs, outputs = (sum(name.startswith(kind) for name in self.names) for kind in "XY")
        if not inputs or not outputs:
            raise self._refuse(f"expected constants X_i and Y_j, got {inputs} and {outputs}")
        for kind, count in (("X", inputs), ("Y", outputs)):
            if f"{kind}_{count - 1}" not in self.names or f"{kind}_0" not in self.names:
                raise self._refuse(f"expected the constants {kind}_0 to {kind}_{count - 1}, without gaps")
        if shape is not None and math.prod(shape) != inputs:
            raise self._refuse(
                f"expected {math.prod(shape)} inputs, as the network of {tuple(shape)} has, got {inputs}"
            )
        # Simple assertions are common; only the disjunctions multiply.
        fixed = [atom for options in conjuncts if len(options) == 1 for atom in options[0]]
        choices = [options for options in conjuncts if len(options) > 1]
        return self._gathered(fixed, choices, inputs, outputs, shape)

    def _text(self) -> str:
        path = Path(self.path)
        try:
            if path.stat().st_size > BYTES:
                raise self._refuse(f"is longer than {BYTES} bytes")
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise self._refuse(f"cannot be read: {error.strerror or error}") from None
        except UnicodeDecodeError:
            raise self._refuse("is no text in UTF-8") from None

    def _declare(self, form: _Form) -> None:
        name = form[1] if len(form) == 3 else None
        if not isinstance(name, str) or not CONSTANT.fullmatch(name) or form[2] != "Real":
            raise self._refuse(f"expected (declare-const X_i Real) or one of Y_j, got {_shown(form)}", form)
        if name in self.names:
            raise self._refuse(f"{name} is declared twice", form)
        self.names.add(name)

    def _count(self, parts: list[list[list[Atom]]], form: _Form | None = None) -> int:
        """Into how many cases alternatives multiply, where that is not too many."""
        cases = math.prod(len(part) for part in parts)
        if cases > CASES:
            raise self._refuse(f"expected at most {CASES} cases, the disjunctions multiply to more", form)
        if cases * sum(max(len(case) for case in part) for part in parts) > ATOMS:
            raise self._refuse(f"expected at most {ATOMS} inequalities in {cases} cases, got more", form)
        return cases

    def _gathered(
        self, fixed: list[Atom], choices: list[list[list[Atom]]], inputs: int, outputs: int, shape: Sequence[int] | None
    ) -> list[tuple[Box, Property]]:
        """Cases of the same box become one property with a group for each."""
        start, always = np.stack([np.full(inputs, -np.inf), np.full(inputs, np.inf)]), []
        self._split(fixed, start, always)
        self._room(self._count(choices), max(2 * inputs, len(always) * outputs))
        boxes: dict[bytes, tuple[np.ndarray, list[list[Atom]]]] = {}
        for picked in itertools.product(*choices):
            ends, rows = start.copy(), list(always)
            self._split(itertools.chain(*picked), ends, rows)
            missing = np.nonzero(~np.isfinite(ends).all(0))[0]
            if len(missing):
                raise self._refuse(f"X_{missing[0]} has no lower or no upper bound")
            if not rows:
                raise self._refuse("expected assertions on outputs, got none")
            if (ends[0] <= ends[1]).all():
                boxes.setdefault(ends.tobytes(), (ends, []))[1].append(rows)
        if not boxes:
            raise self._refuse("no input lies within the bounds")
        self._room(sum(len(rows) for _, groups in boxes.values() for rows in groups), outputs)
        pairs = []
        for ends, groups in boxes.values():
            low, high = torch.from_numpy(ends).view(2, 1, *(shape or (inputs,)))
            pairs.append((Box(low, high), _property(groups, outputs)))
        return pairs

    def _room(self, count: int, width: int) -> None:
        if count * width > ENTRIES:
            raise self._refuse(f"{count} cases or rows of {width} numbers are more than can be held")

    def _split(self, atoms: Iterable[Atom], ends: np.ndarray, rows: list[Atom]) -> None:
        """Take bounds of single inputs into `ends`, conditions of outputs into `rows`."""
        for coefficients, bound in atoms:
            if all(name.startswith("Y_") for name in coefficients):
                rows.append((coefficients, bound))
                continue
            if len(coefficients) != 1:
                raise self._refuse(f"expected bounds on single inputs, got one of {', '.join(list(coefficients)[:5])}")
            ((name, factor),) = coefficients.items()
            end, side = bound / factor, int(factor > 0)
            if abs(factor) != 1:
                end = np.nextafter(end, np.inf if side else -np.inf)  # rounding must not lose an input
            i = int(name[2:])
            ends[side, i] = min(ends[1, i], end) if side else max(ends[0, i], end)

    def _forms(self, text: str) -> Iterator[_Form]:
        """S-expressions."""
        stack: list[_Form] = []
        line = 1
        for match in re.finditer(r"\n|;[^\n]*|[()]|[^\s();]+", text):
            token = match.group()
            if token == "\n":
                line += 1
            elif token[0] == ";":
                continue
            elif token == "(":
                stack.append(_Form(line))
                if len(stack) > DEPTH:
                    raise self._refuse(f"expected at most {DEPTH} parentheses within each other", stack[-1])
            elif token == ")":
                if not stack:
                    raise self._refuse("a parenthesis closes nothing", _Form(line))
                form = stack.pop()
                if not stack:
                    yield form
                else:
                    stack[-1].append(form)
            elif stack:
                stack[-1].append(token)
            else:
                raise self._refuse(f"expected a parenthesis, got {_shown(token)}", _Form(line))
        if stack:
            raise self._refuse("a parenthesis is not closed", stack[-1])

    def _dnf(self, form: str | _Form, above: _Form) -> list[list[Atom]]:
        """A formula as alternatives, each a list of atoms."""
        if isinstance(form, str) or len(form) < 2:
            raise self._refuse(f"expected a formula, got {_shown(form)}", above if isinstance(form, str) else form)
        head, *rest = form
        if head == "or":
            cases = [case for part in rest for case in self._dnf(part, form)]
            self._count([cases], form)
            return cases
        if head == "and":
            parts = [self._dnf(part, form) for part in rest]
            self._count(parts, form)
            return [list(itertools.chain(*picked)) for picked in itertools.product(*parts)]
        if head in ("<=", ">=") and len(rest) == 2:
            return [[self._atom(head == "<=", rest[0], rest[1], form)]]
        raise self._refuse(f"expected and, or, <= or >=, got {_shown(head)}", form)

    def _atom(self, below: bool, first: str | _Form, second: str | _Form, form: _Form) -> Atom:
        (left, a), (right, b) = self._linear(first, form), self._linear(second, form)
        sign = 1.0 if below else -1.0
        coefficients = {n: sign * (left.get(n, 0.0) - right.get(n, 0.0)) for n in {**left, **right}}
        bound = sign * (b - a)
        if not all(map(math.isfinite, (*coefficients.values(), bound))):
            raise self._refuse("its numbers overflow", form)
        return {n: c for n, c in coefficients.items() if c}, bound

    def _linear(self, term: str | _Form, above: _Form) -> tuple[dict[str, float], float]:
        """A constant or a number, or a sum, difference or multiple of such."""
        if isinstance(term, str):
            if term in self.names:
                return {term: 1.0}, 0.0
            if CONSTANT.fullmatch(term):
                raise self._refuse(f"{term} is not declared", above)
            value = float(term) if NUMBER.fullmatch(term) else math.nan
            if not math.isfinite(value):
                raise self._refuse(f"expected a finite number or X_i or Y_j, got {_shown(term)}", above)
            return {}, value
        head, *rest = term or [""]
        parts = [self._linear(part, term) for part in rest]
        if head in ("+", "-") and parts:
            signs = [1.0, *[1.0 if head == "+" else -1.0] * (len(parts) - 1)]
            if head == "-" and len(parts) == 1:
                signs = [-1.0]
            total: dict[str, float] = {}
            for sign, (coefficients, _) in zip(signs, parts, strict=True):
                for name, factor in coefficients.items():
                    total[name] = total.get(name, 0.0) + sign * factor
            return total, sum(sign * constant for sign, (_, constant) in zip(signs, parts, strict=True))
        if head == "*" and len(parts) == 2 and (not parts[0][0] or not parts[1][0]):
            (_, factor), (coefficients, constant) = parts if not parts[0][0] else (parts[1], parts[0])
            return {n: factor * c for n, c in coefficients.items()}, factor * constant
        raise self._refuse(f"expected a linear term, got {_shown(head)}", term)


def _shown(part: str | _Form) -> str:
    """The beginning of a part of the file, as it stands there."""
    text = (
        repr(part)
        if isinstance(part, str)
        else "(" + " ".join(p if isinstance(p, str) else "(…)" for p in part[:4]) + ")"
    )
    return text if len(text) <= 60 else text[:59] + "…"


def _property(groups: list[list[Atom]], outputs: int) -> Property:
    """A group of rows for each case."""
    rows = [(g, coefficients, bound) for g, atoms in enumerate(groups) for coefficients, bound in atoms]
    C = torch.zeros(len(rows), outputs, dtype=torch.float64)
    for line, (_, coefficients, _) in zip(C, rows, strict=True):
        for name, factor in coefficients.items():
            line[int(name[2:])] = factor
    t = torch.tensor([bound for _, _, bound in rows], dtype=torch.float64)
    return Property(C, t, torch.tensor([g for g, _, _ in rows]))


def write_vnnlib(path: str | Path, box: Box, prop: Property, comment: str = "") -> Path:
    """Write a property.

    Bounds are widened by one step of float32 and written so that reading gives the same float64 numbers: a point of the
    box stays in it, however a tool reads the file.
    """
    if len(box) != 1:
        raise ValueError(f"expected one box, got {len(box)}")
    low, high = (t.detach().cpu().flatten().to(torch.float32) for t in (box.lower, box.upper))
    low = torch.nextafter(low, torch.full_like(low, -torch.inf)).double()
    high = torch.nextafter(high, torch.full_like(high, torch.inf)).double()
    lines = [f"; {comment}"] if comment else []
    lines += [f"(declare-const X_{i} Real)" for i in range(len(low))]
    lines += [f"(declare-const Y_{j} Real)" for j in range(prop.C.shape[1])]
    for i, (a, b) in enumerate(zip(low.tolist(), high.tolist(), strict=True)):
        lines += [f"(assert (>= X_{i} {_number(a)}))", f"(assert (<= X_{i} {_number(b)}))"]
    groups = []
    for g in prop.groups.unique().tolist():
        rows = (prop.groups == g).nonzero()[:, 0].tolist()
        groups.append("(and " + " ".join(_row(prop.C[r], float(prop.t[r])) for r in rows) + ")")
    lines.append("(assert (or " + " ".join(groups) + "))")
    Path(path).write_text("\n".join(lines) + "\n")
    return Path(path)


def _row(coefficients: Tensor, bound: float) -> str:
    """$C_r z \\le t_r$; a difference of two outputs in the form that all tools read."""
    terms = [(j, c) for j, c in enumerate(coefficients.tolist()) if c]
    if bound == 0 and len(terms) == 2 and {terms[0][1], terms[1][1]} == {1.0, -1.0}:
        plus, minus = (terms[0][0], terms[1][0]) if terms[0][1] > 0 else (terms[1][0], terms[0][0])
        return f"(>= Y_{minus} Y_{plus})"
    if len(terms) == 1 and terms[0][1] in (1.0, -1.0):
        j, c = terms[0]
        return f"(<= Y_{j} {_number(bound)})" if c > 0 else f"(>= Y_{j} {_number(-bound)})"
    written = [f"(* {_number(c)} Y_{j})" for j, c in terms]
    return (
        f"(<= (+ {' '.join(written)}) {_number(bound)})" if len(written) > 1 else f"(<= {written[0]} {_number(bound)})"
    )


def _number(value: float) -> str:
    """Digits that give the same float64, without an exponent, which not all tools read."""
    return np.format_float_positional(value, unique=True, trim="0")
