"""Logs a cell's metrics, pictures and progress; makes panels on Weights & Biases."""
