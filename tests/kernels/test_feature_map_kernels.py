"""The Triton functions of feature maps: right in the interpreter, compiled to cubins, passed to a
kernel as constants, and the same in every process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
import triton
import triton.language as tl
from bla_inductor.kernels.feature_map import compiled
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).parents[1] / "ops"))
from feature_map_table import PHI, RELU

PROGRAM = """
    from bla_inductor.kernels.feature_map import compiled
    for text in ("x*sigmoid(x)", "softmax", "Piecewise((x, x > 20), (log(1 + exp(x)), True))"):
        phi = compiled(text)
        print(phi.forward.fn.__name__, phi.forward.cache_key, phi.backward.cache_key)
"""


def test_values_and_gradients_in_the_interpreter():
    suite = Path(__file__).with_name("feature_map_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@triton.jit
def kernel(X, G, Y, DX, rows, PHI: tl.constexpr, PHI_BACKWARD: tl.constexpr):
    r = tl.arange(0, 16)[:, None]
    at = r * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(X + at).to(tl.float32)
    tl.store(Y + at, PHI(x, r < rows))
    tl.store(DX + at, PHI_BACKWARD(x, tl.load(G + at), r < rows))


def _compile(text, capability=90):
    phi = compiled(text)
    constants = {"PHI": phi.forward, "PHI_BACKWARD": phi.backward}
    signature = {"X": "*bf16", "G": "*fp32", "Y": "*fp32", "DX": "*fp32", "rows": "i32"}
    source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32))


@pytest.mark.parametrize("name", PHI)
def test_compiles_to_a_cubin(name):
    assert _compile(PHI[name][0]).asm["cubin"]


@pytest.mark.parametrize("capability", [80, 100])
def test_compiles_for_other_gpus(capability):
    assert _compile(f"{RELU}**3 -> exp(x) -> l2(max=1e-12)", capability).asm["cubin"]


def test_the_exponential_is_taken_once():
    ptx = _compile("Piecewise((x + 1, x > 0), (exp(x), True))").asm["ptx"]
    elements = 16 * 64 // (4 * 32)  # of one thread
    assert ptx.count("ex2.approx") == elements


def test_equal_maps_are_one_function():
    assert compiled("1/(1 + exp(-x))") is compiled("sigmoid( x )")
    assert (
        compiled("l2(max=0.5)").forward.fn.__name__ != compiled("l2(add=0.5)").forward.fn.__name__
    )


def test_every_process_makes_the_same_functions(run_python):
    first = run_python(PROGRAM, PYTHONHASHSEED="1").stdout
    assert first == run_python(PROGRAM, PYTHONHASHSEED="2").stdout
    assert first.count("phi_") == 3


def test_not_a_feature_map():
    with pytest.raises(ValueError, match="relu is not in the language"):
        compiled("relu(x)")
