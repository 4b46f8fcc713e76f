"""The proofs are run by test_triton.py, each file in a process of its own; they share the helpers of the folder above."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
