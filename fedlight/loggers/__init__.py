"""Where a cell's metrics, pictures and progress go, and the panels on Weights & Biases."""
