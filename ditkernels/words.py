"""English in what is printed."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """As in "1 image", "2 images"; the noun is one whose plural ends in s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
