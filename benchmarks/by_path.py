"""Tells in one line how a script that was run by its path is run.

The folders of scripts link to this file by the names of this tree's packages. Such a link is found where Python looks beside the
script first, as it does for ``python benchmarks/speed/ops.py``, and never for ``python -m benchmarks.speed.ops``.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
module = ".".join(Path(sys.argv[0]).resolve().relative_to(ROOT).with_suffix("").parts)
raise SystemExit(f"{sys.argv[0]}: run it in {ROOT} as python -m {module}")
