"""The metrics there are, and their conventional settings."""

from __future__ import annotations

METRICS = ("fid", "sfid", "inception_score", "precision_recall")
SPLIT_SIZE = 5000
NEIGHBOURS = 3
