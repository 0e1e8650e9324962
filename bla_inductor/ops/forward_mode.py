"""Forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad): by the formula in torch's
own operations, in any order with reverse mode. The kernels know nothing of tangents.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch.autograd import forward_ad

from bla_inductor.ops import aten
from bla_inductor.ops.checks import check_arguments
from bla_inductor.ops.schema import Inputs, linear_attention


def active(args: Sequence[Any]) -> bool:
    """Whether one of `args` may carry a tangent. To ask the tensors takes 1 µs each, so they are
    asked only where a graph of Dynamo's may have entered forward mode without telling
    torch.autograd.forward_ad: while it is compiled, and inside torch.func.
    """
    if forward_ad._current_level >= 0:
        return torch._C._is_fwd_grad_enabled()
    inside = torch._C._are_functorch_transforms_active() or TracingContext.try_get() is not None
    return inside and carried(args)


def carried(args: Sequence[Any]) -> bool:
    """Whether one of `args` carries a tangent. There is one level: torch nests none."""
    tensors = [t for t in args if isinstance(t, Tensor)]
    unpack = torch._VF._unpack_dual
    return torch._C._is_fwd_grad_enabled() and any(
        unpack(t, level=0)[1] is not None for t in tensors
    )


def attention(*args: Any, **kwargs: Any) -> Tensor:
    """`bla::linear_attention` where tensors may carry tangents that nobody else knows of."""
    return forward(*args, **kwargs)[0] if carried(args) else linear_attention(*args, **kwargs)


def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What `bla::linear_attention_forward` returns, with tangents."""
    x = Inputs(*args, **kwargs)
    check_arguments(x)
    with aten.without_autocast(x.q.device.type):
        out, state, key_sum = aten.forward(x, keep_state=True)
    assert state is not None
    assert key_sum is not None
    out = out.to(x.out_dtype or x.q.dtype)
    if x.out_order is None:
        return out.contiguous(), state, key_sum
    inverse = [x.out_order.index(d) for d in range(out.dim())]
    return out.permute(list(x.out_order)).contiguous().permute(inverse), state, key_sum
