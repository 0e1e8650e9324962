"""Which arithmetic a product runs in (see `common.py`), by the dtypes that go in and come out.

The yardstick is the error of the user's own graph. A graph in bf16 rounds its state to bf16, so may we; fp16
operands go through tf32, of which they are a subset, because a state in fp16 would overflow at 65504. A float32
result of 16-bit inputs is the user's upcast, so nothing may be rounded below fp32. float32 inputs follow
`torch.get_float32_matmul_precision()`: "highest" is fp32 on the CUDA cores, because three tf32 products, though
they carry enough bits, are added up with truncation: 2 to 5 times the error of the user's graph (H100).
"""

import torch


def float32_precision() -> str:
    """ieee for "highest", else tf32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def state_precision(dtype: torch.dtype) -> str:
    """Both operands are inputs: products of 16-bit values are exact in fp32."""
    return float32_precision() if dtype == torch.float32 else "native"


def output_precision(dtype: torch.dtype, out_dtype: torch.dtype) -> str:
    """One operand is an input, the other the fp32 state."""
    if dtype == torch.float32:
        return float32_precision()
    if dtype == out_dtype == torch.bfloat16:
        return "native"
    return "tf32" if dtype == torch.float16 and out_dtype != torch.float32 else "split"


def backward_precision(dtype: torch.dtype, do_dtype: torch.dtype) -> str:
    """Gradients of 16-bit inputs are rounded to 16 bit at the end: tf32 suffices even for a float32 `do`."""
    if dtype == torch.float32:
        return float32_precision()
    return "native" if dtype == do_dtype == torch.bfloat16 else "tf32"
