"""Checkpoints: their format, what writes them, the folder of a run, and other people's. docs/training.md."""
