"""How a delta is encoded on its way: one file a transform."""
