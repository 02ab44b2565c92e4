"""Compression of deltas, one transform a file."""
