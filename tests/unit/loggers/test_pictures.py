"""Pictures of generated images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedlight.loggers.pictures import sample_grid


@pytest.mark.parametrize("columns", [1, 3, 10])
def test_a_long_title_is_not_cut(tmp_path: Path, columns: int) -> None:
    images = torch.zeros(columns, 1, 8, 8, dtype=torch.uint8)
    title = "UDEC_WARM, 10 clients, after round 16; each column is conditioned on its class"

    sample_grid(tmp_path / "grid.png", [("", images)], title, [str(n) for n in range(columns)])

    pixels = np.asarray(Image.open(tmp_path / "grid.png").convert("L"))
    assert pixels.min() < 128
    assert (pixels[:, :3] == 255).all()
    assert (pixels[:, -3:] == 255).all()
