"""What an import brings along: packages that only drawing, tables or some data need are imported where they are used."""

from __future__ import annotations

import subprocess
import sys

WALK = """
import importlib, sys
from torchfolio import catalog
# scikit-learn asks for pandas and does without it.
sys.modules.update(dict.fromkeys(["matplotlib", "pandas", "datasets", "transformers", "diffusers"]))
for paper in catalog.papers().values():
    if paper.is_in:
        importlib.import_module("torchfolio.experiments." + paper.slug)
"""


def test_experiments_import_what_only_drawing_and_tables_need_where_they_do():
    done = subprocess.run([sys.executable, "-c", WALK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_report_is_written_without_torch():
    code = (
        "import sys, torchfolio.report, torchfolio.runs\n"
        "heavy = {'torch', 'pandas', 'scipy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_digits_are_read_without_scikit_learn():
    code = "import sys, torchfolio.data\ntorchfolio.data.load('digits')\nassert 'sklearn' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
