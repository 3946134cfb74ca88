"""A data set of a few hundred tiny images."""

from pathlib import Path

import numpy as np
import pytest
from tiny_pictures import pictures


@pytest.fixture
def tiny_npz(tmp_path: Path) -> Path:
    (x_train, y_train), (x_test, y_test) = pictures(240, 0), pictures(90, 1)
    path = tmp_path / "tiny.npz"
    np.savez_compressed(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path
