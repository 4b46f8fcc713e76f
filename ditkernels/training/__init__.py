"""Training: a config, a loop, and what happens between a gradient and the weights. docs/training.md."""
