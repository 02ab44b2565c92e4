"""Federated training of diffusion models, swept over methods, clients and data distributions."""

__version__ = "0.1.0"
