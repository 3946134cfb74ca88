"""The Triton path. Without a GPU its kernels run in Triton's interpreter, in another process; with one, compiled.
They compile for every card without one; from what they compile to, the words of memory traffic are counted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

CASES = Path(__file__).with_name("sp_triton_cases.py")

if torch.cuda.is_available():
    from sp_triton_cases import *  # noqa: F403
else:

    def in_the_interpreter(marked, least):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(CASES)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )
        print(done.stdout)
        assert done.returncode == 0, done.stdout
        assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= least and "skipped" not in done.stdout

    def test_kernels_in_the_interpreter():
        """sp_triton_cases.py; its report is this test's."""
        in_the_interpreter("not slow", 10)

    @pytest.mark.slow
    def test_more_kernels_in_the_interpreter():
        in_the_interpreter("slow", 20)


POINTERS = {
    "table": "*i64", "chunks": "*i32", "live": "*i64", "numbers": "*fp64", "products": "*fp64", "wrongs": "*i32",
    "averages": "*fp64", "gamma": "*fp64", "rates": "*fp32", "marks": "*fp32", "sums": "*fp64",
}  # fmt: skip
WIDTH = {"f32": 4, "f16": 2, "bf16": 2, "i8": 1, "f64": 8, "i32": 4, "i64": 8}


def compiled(name, capability, **constants):
    """The kernel for a card, without one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sp_yolo.optim import triton_kernels, triton_settle

    kernel = getattr(triton_kernels if name in ("look", "update") else triton_settle, name)
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else POINTERS.get(n, "i32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in POINTERS}
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


def settings(kernel, dtype, aligned=True):
    common = {"DTYPE": getattr(triton.language, dtype), "ALIGNED": aligned, "MAXIMIZE": False}
    own = {"look": {"LOOK": True}, "update": {"FISHER": True, "NESTEROV": True, "SQUARES": True, "MASKS": False}}
    return {**common, **own[kernel]} if kernel in own else {}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


EVERY = [
    *((kernel, capability, dtype) for kernel in ("look", "update") for capability in (75, 80, 86, 89, 90)
      for dtype in ("float32", "bfloat16", "float16")),
    *((kernel, capability, "float32") for kernel in ("settle", "secants") for capability in (75, 80, 86, 89, 90)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "capability", "dtype"), EVERY)
def test_kernels_compile_for_every_card(kernel, capability, dtype):
    assert len(compiled(kernel, capability, **settings(kernel, dtype)).asm["cubin"]) > 1000


def traffic(kernel, dtype):
    """(bytes loaded, bytes stored) of an element outside the run of s: by the loads and stores of a whole tile that no
    mask holds back. The tile's loads of 16 bytes are counted too, in the machine's text."""
    found = compiled(kernel, 90, **settings(kernel, dtype))
    block = r"tensor<1024x(?:!tt\.ptr<)?(\w+)>"
    text = found.asm["ttir"]
    loads = [WIDTH[t] for t in re.findall(rf"= tt\.load %\S+ : {block}", text)]
    stores = [WIDTH[t] for t in re.findall(rf"tt\.store %\S+, %\S+ : {block}", text)]
    return sum(loads), sum(stores), len(re.findall(r"ld\.global\S*\.v4", found.asm["ptx"]))


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_words_of_traffic_per_parameter(dtype, size):
    """Eight with the look at the gradients, and of s two sixteenths; 10 are the bound. Of float32 state."""
    loaded, stored, wide = traffic("look", dtype)
    assert (loaded, stored) == (size, 0) and wide >= 1
    loaded, stored, wide = traffic("update", dtype)
    assert (loaded, stored) == (2 * size + 8, size + 8)
    assert wide == (2 * size + 8) // 2  # eight elements a thread: all of them are read 16 bytes at a time
    assert (3 * size + size + 16) / 4 + 2 / 16 <= 10
