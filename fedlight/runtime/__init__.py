"""How a cell survives: seeds, files, errors."""
