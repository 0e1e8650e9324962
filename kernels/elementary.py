"""Elementary functions in fp32: those that Triton's language has not, and those that it has with
fewer digits than torch's.

libdevice has them too, but the interpreter cannot call it.
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl


@triton.jit
def exp(x):
    """tl.exp takes exp2 of the rounded x·log2(e), an error of 4e-8·|x|; here it is made good."""
    t = x * 1.4426950408889634
    rest = tl.fma(x, 1.4426950408889634, -t) + x * 1.9259629911266175e-08
    e = tl.exp2(t)
    normal = (t > -126.0) & (e < float("inf"))
    return tl.where(normal, e + e * (rest * 0.6931471805599453), e)


@triton.jit
def fast_exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def expm1(x):
    """exp(x) - 1: its series near 0, where the difference would lose digits."""
    p = 1.0 + x * (1.0 / 8)
    p = 1.0 + x * (1.0 / 7) * p
    p = 1.0 + x * (1.0 / 6) * p
    p = 1.0 + x * (1.0 / 5) * p
    p = 1.0 + x * (1.0 / 4) * p
    p = 1.0 + x * (1.0 / 3) * p
    p = 1.0 + x * (1.0 / 2) * p
    return tl.where(tl.abs(x) < 0.5, x * p, exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x): near 0 as 2·artanh(s), s = x/(2 + x), whose series has no cancellation."""
    s = x / (2.0 + x)
    s2 = s * s
    p = 1.0 / 7 + s2 * (1.0 / 9)
    p = 1.0 / 5 + s2 * p
    p = 1.0 / 3 + s2 * p
    p = 2.0 + 2.0 * s2 * p
    return tl.where(tl.abs(x) < 0.4, s * p, tl.log(1.0 + x))


@triton.jit
def tanh(x):
    """(1 - e) / (1 + e) with e = exp(-2|x|), which cannot overflow."""
    a = tl.abs(x)
    m = expm1(-2.0 * a)
    y = -m / (2.0 + m)
    return tl.where(x < 0, -y, y)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)
