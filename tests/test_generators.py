"""The user's random generators stay where they are: no module of the library seeds the global ones by itself."""

import re
from pathlib import Path

import torchfolio

ROOT = Path(torchfolio.__file__).parent
SEEDING = re.compile(r"(?:torch\.manual_seed|torch\.cuda\.manual_seed\w*|np\.random\.seed|\brandom\.seed)\(")


def test_global_generators_are_seeded_in_one_place():
    # `engine.seeded` puts them back; arms of experiments run inside it.
    allowed = {ROOT / "engine" / "modes.py", *(ROOT / "experiments").glob("*.py"), *(ROOT / "peers").glob("*.py")}
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted(ROOT.rglob("*.py"))
        if path not in allowed
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SEEDING.search(line) and ">>>" not in line
    ]
    assert not found, f"use torchfolio.engine.seeded in {', '.join(found)}"
