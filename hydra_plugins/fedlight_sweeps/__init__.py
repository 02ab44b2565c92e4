"""Hydra plugins: the sweepers and launchers of fedlight. Hydra looks for plugins only in this package."""
