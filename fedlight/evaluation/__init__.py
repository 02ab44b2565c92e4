"""Scores of generated images: feature extractors, references of real images, and the metrics."""
