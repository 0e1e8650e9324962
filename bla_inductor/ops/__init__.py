"""The differentiable operator `torch.ops.bla.linear_attention`; importing this package registers
it.

For batch-like dims `*`, query index n, key index m, feature c, value channel d:

    out[*,n,d] = scale · Σ_c φq(q)[*,n,c] · (Σ_m w[*,m] · φk(k)[*,m,c] · v[*,m,d])
                 ──────────────────────────────────────────────────────────────────
                 guard( norm_scale · Σ_c q'[*,n,c] · Σ_m w[*,m] · k'[*,m,c] )

Shapes: q (*batch, N, D), k (*batch, M, D), v (*batch, M, Dv), q_norm (*batch, N, D'),
k_norm (*batch, M, D'), key_weight (*batch, M). All but key_weight have the same rank, at least 2;
every batch dim is equal or 1 (broadcast). Any strides. One dtype for all: bfloat16, float16,
float32, float64; key_weight may also have another one of these, or bool.

- φq, φk = `q_map`, `k_map`, texts in the language of `ops/feature_map.py`: "" is the identity,
  "Piecewise((x + 1, x > 0), (exp(x), True))" is elu(x) + 1. They are evaluated in fp32 (fp64). On
  CUDA φ of a 16-bit tensor is rounded to 16 bits, whatever the result's dtype.
- q' = `q_norm_map`(q_norm) and k' = `k_norm_map`(k_norm); without q_norm, q' is φq(q), and so for
  k. q_norm may be q itself, with another map.
- w = key_weight, 1 if absent: a padding mask, or any weight, with a gradient if it is a float.

| normalizer | guard(z) | note |
|---|---|---|
| `"none"` | absent: no division | takes no q_norm, k_norm |
| `"add"` | z + eps | eps may be 0 |
| `"clamp"` | max(z, eps) | the gradient of z is zero where z < eps; at z = eps as torch.clamp's |

`upcast=True`: the formula was written in float32 although inputs and result have 16 bit, so only
the result may be rounded. `out_dtype` defaults to the inputs' dtype; 16-bit inputs with a float32
result are computed to float32 accuracy. `out_order` lists the result's dims from outermost to
innermost in memory; the result is dense in that order (default: contiguous).

`linear_attention_forward` also returns what the backward needs: the state Σ_m w·φk(k)ᵀv (*key
batch, D, Dv) and Σ_m w·k' (*key batch, D'), fp32 (fp64 for fp64 inputs), where the key batch is k,
v, k_norm and key_weight broadcast together. Beside it, only the inputs as given are saved.
`linear_attention_backward` is itself differentiable. Autocast does not change what the operator
computes. This package needs torch alone; Triton is imported by the first call on
a CUDA tensor.

Algorithm: Katharopoulos et al., "Transformers are RNNs", ICML 2020; Shen et al., "Efficient
Attention", WACV 2021.
"""

from bla_inductor.ops import autograd, dispatch, fake, flops, piecewise, vmap
from bla_inductor.ops.piecewise import piecewise_sparse_attention
from bla_inductor.ops.schema import (
    linear_attention,
    linear_attention_backward,
    linear_attention_forward,
)
from bla_inductor.ops.untraced import untraced_module

__all__ = [
    "linear_attention",
    "linear_attention_backward",
    "linear_attention_forward",
    "piecewise_sparse_attention",
]

for module in (autograd, dispatch, fake, flops, piecewise, vmap):  # importing them registered them
    untraced_module(module)
