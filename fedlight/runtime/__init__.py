"""How a cell survives: seeds, files, locks, what SLURM says, errors."""
