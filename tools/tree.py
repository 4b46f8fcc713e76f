"""Where this tree lies, and the environment in which a process finds its modules from any folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def found_from(variables: Mapping[str, str]) -> dict[str, str]:
    """These environment variables, with the tree in front of what PYTHONPATH names."""
    before = variables.get("PYTHONPATH")
    return {**variables, "PYTHONPATH": os.pathsep.join([str(ROOT), *([before] if before else [])])}
