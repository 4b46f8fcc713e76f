"""FID, sFID, Inception Score, precision and recall by the conventions of the ADM suite. docs/evaluation.md."""
