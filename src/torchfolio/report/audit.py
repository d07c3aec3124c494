"""What an audit found, as a page that needs nothing else."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from torchfolio import __version__
from torchfolio.report.page import _asset
from torchfolio.report.svg import inline_svg
from torchfolio.runs.store import atomic


def write_audit(
    out: Path,
    *,
    name: str,
    detector: str,
    suspicious: bool,
    sentences: Sequence[str],
    notes: Sequence[str] = (),
    figures: Mapping[str, str] | None = None,
    pictures: Sequence[tuple[Any, str]] = (),
) -> Path:
    """Write the page of an audit.

    Args:
        out: the HTML file.
        name: of the network.
        detector: that was used.
        suspicious: the verdict.
        sentences: the verdict in words; the first is the headline.
        notes: warnings.
        figures: numbers by what they say.
        pictures: matplotlib figures and their captions.

    Returns:
        The file.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("torchfolio.report", "."), autoescape=True, undefined=StrictUndefined
    )
    page = environment.get_template("audit.html").render(
        name=name,
        detector=detector,
        suspicious=suspicious,
        headline=sentences[0],
        sentences=sentences[1:],
        notes=notes,
        figures=figures or {},
        pictures=[
            {"svg": Markup(_drawn(figure, k, caption)), "caption": caption}
            for k, (figure, caption) in enumerate(pictures)
        ],
        version=__version__,
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        style=Markup(_asset("page.css")),
    )
    with atomic(out) as file:
        file.write(page.encode("utf-8"))
    return out


def _drawn(figure: Any, k: int, caption: str) -> str:
    import matplotlib.pyplot as plt

    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    return inline_svg(text.getvalue(), f"picture-{k}", caption)
