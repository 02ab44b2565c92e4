"""Federated training of diffusion models: single runs and sweeps over methods, clients and partitions."""

__version__ = "0.1.0"
