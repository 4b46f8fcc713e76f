"""Makes `tests`, `benchmarks` and `tools` importable by these names, and nothing else of this tree.

The tree is not put on the path, so that `pytest` tests the installed package and `python -m pytest` the one beside this file.
Another package may have installed a `tests` of its own, which must not be found first.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

for name in ("tests", "benchmarks", "tools"):
    spec = importlib.util.spec_from_file_location(name, ROOT / name / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
