"""Secure aggregation: the server learns sums of updates and no single update (Bonawitz et al. 2017)."""
