"""Operations, parameters and bytes of a network by layer, and their card."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn

    from torchfolio.report.sheet import Sheet

BETWEEN = "(between layers)"


MOST_ROWS = 20  # of a table that is read at a glance


def cost(net: nn.Module, x: Tensor, place: Any) -> dict[str, Any]:
    """Operations, parameters and bytes by layer, for one example; and what a training step of 32 keeps.

    Rows sum up to the whole network: what is used without a call of its module has a row too.
    """
    import pandas as pd

    from torchfolio.measure import count_flops, flops_by_module, saved_bytes

    one = x[:1].to(place)
    table: Any = flops_by_module(net, one)
    table["output_bytes"] = [math.prod(shape) * 4 if shape else 0 for shape in table["shape"]]
    known, rest = set(table["name"]), {}
    for name, parameter in net.named_parameters():
        owner = name.rpartition(".")[0]
        if owner not in known:
            rest[owner] = rest.get(owner, 0) + parameter.numel()
    rows = [_row(owner or "(the network itself)", type(net.get_submodule(owner)).__name__, count, 0)
            for owner, count in rest.items()]  # fmt: skip
    between = count_flops(net, one) - int(sum(table["flops"].tolist()))
    if between:
        rows.append(_row(BETWEEN, "", 0, between))
    if rows:
        table = pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
    batch = x[:32].to(place)
    saved = saved_bytes(lambda: net(batch).sum().backward(), exclude=net).peak
    net.zero_grad(set_to_none=True)
    return {"table": table, "saved": int(saved), "batch": len(batch)}


def _row(name: str, kind: str, parameters: int, flops: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "parameters": parameters, "flops": flops, "shape": None, "output_bytes": 0}


def _by_block(table: pd.DataFrame) -> pd.DataFrame:
    """The table of layers by the parts of the network, as fine as fits on a screen."""
    names = [str(n) for n in table["name"]]
    depth = 1
    while depth < 12 and len({_prefix(n, depth + 1) for n in names}) <= MOST_ROWS:
        depth += 1
    parts = [_prefix(n, depth) for n in names]
    grouped: Any = table.assign(part=parts).groupby("part", sort=False)
    rows = grouped[["parameters", "flops", "output_bytes"]].sum()
    rows.insert(0, "layers", grouped.size())
    return rows


def _prefix(name: str, depth: int) -> str:
    return name if name.startswith("(") else ".".join(name.split(".")[:depth])


def cost_card(name: str, cost: dict[str, Any]) -> Sheet:
    from torchfolio.report.sheet import Sheet, Table

    table: Any = cost["table"]
    total = [int(sum(table[key].tolist())) for key in ("parameters", "flops", "output_bytes")]
    shown = table if len(table) <= MOST_ROWS else _by_block(table)
    names = list(map(str, shown.index if shown.index.name else shown["name"]))
    operations = dict(zip(names, shown["flops"].tolist(), strict=True))
    between = operations.pop(BETWEEN, 0)
    most = max(operations, key=lambda n: operations[n]) if operations else ""
    sentences = [
        f"{total[0]:,} parameters, {total[1]:,} floating-point operations for one example, whose activations take "
        f"{total[2]:,} bytes in float32. Training on a batch of {cost['batch']} keeps {cost['saved']:,} bytes for the "
        "backward pass at its peak.",
    ]
    if total[1] and most:
        sentences.append(f"{most} takes the most operations, {operations[most] / total[1]:.0%} of all.")
    if between:
        sentences.append(
            f"{between / total[1]:.0%} are done between the layers that are listed: attention, products of inputs."
        )
    notes = []
    if shown is not table:
        notes.append(f"The {len(table)} layers are summed by the parts of the network; --json gives each.")
    columns = {"flops": "operations", "output_bytes": "bytes of outputs", "shape": "output"}
    return Sheet(
        f"What does {name} cost?",
        "operations, parameters, memory",
        sentences=sentences,
        notes=notes,
        tables=[Table.of(shown.rename(columns=columns))],
    )
