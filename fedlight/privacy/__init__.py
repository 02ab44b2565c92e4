"""Differential privacy: accounting, DP-SGD, and empirical tests by membership inference."""
