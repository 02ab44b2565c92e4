"""Image quality: the feature extractors, what generated images are compared with, and the metrics."""
