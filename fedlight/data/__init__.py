"""Data sets as tensors, partitions over clients, and what one client sees of them."""
