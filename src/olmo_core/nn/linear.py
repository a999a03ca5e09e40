"""Linear layers of a token or two on a CPU, where a product does nothing but read its matrix.

MKL's product of a matrix and a vector uses one thread and half of the memory's bandwidth (11 GB/s
of 23 on an AMD EPYC, where reading alone takes 22); its batched product of blocks of rows uses all
of both. So a matrix of float32 is cut into blocks, which are views.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.nn.dispatch import is_plain

__all__ = ["apply_linear", "apply_linears", "linear"]

_MOST_ROWS = 2  # from 4 on MKL's product of two matrices is as good
_LEAST_WEIGHTS = 2**15  # below, launching counts: a block costs two views more
_LONGEST_ROW = 2048  # beyond, a single thread's reads of one vector are as good
_BLOCK, _LEAST_BLOCK = 64, 8


def apply_linears(modules: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """``[module(x) for module in modules]``, as :func:`linear` computes it where nothing but the
    layers' own products would run."""
    if not _is_short(x):
        return [module(x) for module in modules]
    return [
        _in_blocks(x, module.weight, module.bias)
        if type(module) is nn.Linear
        and module.weight.numel() >= _LEAST_WEIGHTS
        and _suits_blocks(x, module.weight, module.bias)
        and is_plain(module)
        else module(x)
        for module in modules
    ]


def apply_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """:func:`apply_linears` of one."""
    return apply_linears((module,), x)[0]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`torch.nn.functional.linear`: the same sums, for few rows in another order.

    :param x: (..., inputs).
    :param weight: (outputs, inputs).
    :param bias: (outputs,).
    :returns: (..., outputs).
    """
    if not (_is_short(x) and _suits_blocks(x, weight, bias)):
        return F.linear(x, weight, bias)
    return _in_blocks(x, weight, bias)


def _in_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    block = math.gcd(outputs, _BLOCK)
    n = outputs // block
    rows = x.reshape(1, -1, inputs).expand(n, -1, -1)
    out = torch.bmm(weight.view(n, block, inputs), rows.mT)  # (n, block, rows)
    if x.numel() > inputs:  # rows lie one after another, as a linear layer's do
        out = out.view(outputs, -1).t().contiguous()
    out = out.view(*x.shape[:-1], outputs)
    return out if bias is None else out + bias


def _is_short(x: Tensor) -> bool:
    """Whether it is a token or two on a CPU, without a gradient and with nobody watching."""
    return (
        not torch.compiler.is_compiling()  # first: comparing sizes would become a guard
        and x.is_cpu
        and x.dtype == torch.float32
        and x.layout == torch.strided
        and x.dim() > 0
        and 0 < x.numel() <= _MOST_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and type(x) is Tensor  # and no mode or transform sees it
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _suits_blocks(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    inputs = weight.shape[-1]
    return (
        torch._C.has_mkl
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dim() == 2
        and weight.dtype == x.dtype
        and weight.is_cpu
        and inputs == x.shape[-1]
        and weight.numel() >= _LEAST_WEIGHTS
        and (inputs <= _LONGEST_ROW or torch.get_num_threads() > 1)
        and math.gcd(weight.shape[0], _BLOCK) >= _LEAST_BLOCK
        and weight.layout == torch.strided
        and weight.is_contiguous()
        and (bias is None or _suits_sum(bias, weight))
    )


def _suits_sum(bias: Tensor, weight: Tensor) -> bool:
    """Whether adding it is what a linear layer does: a sum would take any dtype and shape."""
    return (
        type(bias) in (Tensor, nn.Parameter)
        and bias.shape == weight.shape[:1]
        and bias.dtype == weight.dtype
        and bias.is_cpu
    )
