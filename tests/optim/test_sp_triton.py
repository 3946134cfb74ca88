"""The Triton path. Without a GPU its kernels run in Triton's interpreter, in another process; with one, compiled."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

CASES = Path(__file__).with_name("sp_triton_cases.py")
TARGETS = [(75, "bf16"), (90, "fp32")]

if torch.cuda.is_available():
    from sp_triton_cases import *  # noqa: F403
else:

    def test_kernels_in_the_interpreter():
        """All of sp_triton_cases.py; its report is this test's."""
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout
        assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 20 and "skipped" not in done.stdout
