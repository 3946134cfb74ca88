"""The kernel that composes pictures. Without a GPU it runs in Triton's interpreter, in another process; with one,
compiled. It compiles for every card without one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

if torch.cuda.is_available():
    from compose_triton_cases import *  # noqa: F403
else:

    def test_the_kernel_in_the_interpreter() -> None:
        """compose_triton_cases.py; its report is this test's."""
        cases = Path(__file__).with_name("compose_triton_cases.py")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )
        assert done.returncode == 0, done.stdout
        passed = re.search(r"(\d+) passed", done.stdout)
        assert passed and int(passed[1]) == 3, done.stdout


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_the_kernel_compiles_for_a_card(capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from sp_yolo.data.compose_triton import compose_kernel

    types = ("*u8", "*i64", "*fp32", "*i32", "*fp32", "*u8", "*u8", "i32", "i32", "constexpr")
    signature = dict(zip(compose_kernel.arg_names, types, strict=True))
    made = compile(
        ASTSource(fn=compose_kernel, signature=signature, constexprs={"BLOCK": 256}), GPUTarget("cuda", capability, 32)
    )
    assert len(made.asm["cubin"]) > 1000
