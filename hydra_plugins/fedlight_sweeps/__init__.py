"""Hydra's sweeper and launchers as fedlight's sweeps need them; Hydra takes plugins from here only."""
