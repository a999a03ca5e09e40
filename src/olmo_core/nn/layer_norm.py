"""Normalisation layers and their configuration.

Each normalises the last dimension. With ``full_precision`` a layer computes in float32 and casts
the result back; float64 inputs are computed in float64 either way.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.config import Config, DType, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.functional import compute_dtype, l2_normalize
from olmo_core.nn.sharded import is_sharded, local

__all__ = [
    "CuTeRMSNorm",
    "FusedRMSNorm",
    "L2Norm",
    "LayerNorm",
    "LayerNormConfig",
    "LayerNormType",
    "QwenRMSNorm",
    "RMSNorm",
]

Share = Callable[[Tensor], Tensor]
_HAS_QUACK = importlib.util.find_spec("quack") is not None


class LayerNormType(StrEnum):
    """The normalisation layers by name."""

    default = "default"
    """:class:`LayerNorm`"""
    rms = "rms"
    """:class:`RMSNorm`"""
    fused_rms = "fused_rms"
    """:class:`FusedRMSNorm`"""
    l2_norm = "l2_norm"
    """:class:`L2Norm`"""
    qwen_rms = "qwen_rms"
    """:class:`QwenRMSNorm`"""
    cute_rms = "cute_rms"
    """:class:`CuTeRMSNorm`"""


@dataclass
class LayerNormConfig(Config):
    """Builds any normalisation layer. None means the class's own default."""

    name: LayerNormType = LayerNormType.default
    """Which layer."""
    eps: float | None = None
    """Added to the variance or the mean square."""
    elementwise_affine: bool | None = None
    """Whether there are learned parameters."""
    bias: bool | None = None
    """Whether a learned bias is among them."""
    full_precision: bool | None = None
    """Whether to compute in float32 at least."""
    dtype: DType | None = None
    """The parameters' type."""

    def num_params(self, size: int) -> int:
        """The number of parameters of the layer that :meth:`build` makes.

        :param size: The width of the layer.
        :raises OLMoConfigurationError: As :meth:`build`.
        """
        return sum(p.numel() for p in self.build(size, init_device="meta").parameters())

    def build(self, size: int, init_device: str = "cpu") -> LayerNorm:
        """Build the layer.

        :param size: The width of the layer: the last dimension of its inputs.
        :param init_device: Where to create the parameters, e.g. "cpu" or "meta".
        :raises OLMoConfigurationError: For an option that the layer lacks, or a bad value.
        """
        options: dict[str, Any] = {
            name: value
            for name in ("eps", "elementwise_affine", "bias", "full_precision")
            if (value := getattr(self, name)) is not None
        }
        if self.dtype is not None:
            options["dtype"] = self.dtype.as_pt()
        if self.elementwise_affine is False and self.bias:
            raise OLMoConfigurationError(
                "bias=True with elementwise_affine=False: a bias is an elementwise parameter; "
                "drop one of the two options"
            )
        if self.name == LayerNormType.l2_norm:
            if self.bias or self.elementwise_affine or self.eps is not None:
                raise OLMoConfigurationError(
                    "l2_norm has neither parameters nor eps; leave bias, elementwise_affine and "
                    f"eps unset, got {self}"
                )
            return L2Norm(size=size, full_precision=options.get("full_precision", True))
        return _CLASSES[self.name](size=size, init_device=init_device, **options)


class LayerNorm(nn.Module):
    """Layer normalisation (arXiv:1607.06450): (x - mean) / sqrt(var + eps) * weight + bias.

    :param size: The width: the last dimension of inputs.
    :param eps: Added to the variance.
    :param elementwise_affine: Learn a weight, and a bias if ``bias``.
    :param bias: Learn a bias; without ``elementwise_affine`` there is none.
    :param full_precision: Compute in float32 at least, parameters included, and cast the result.
    :param dtype: The parameters' type.
    :param init_device: Where to create the parameters.
    :raises OLMoConfigurationError: For ``size`` < 1, a negative ``eps``, or a ``dtype`` that is
        not floating-point.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        *,
        size: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        full_precision: bool = True,
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
    ) -> None:
        super().__init__()
        if size < 1:
            raise OLMoConfigurationError(f"a norm's size must be at least 1, got {size}")
        if not eps >= 0:
            raise OLMoConfigurationError(f"a norm's eps must not be negative, got {eps}")
        if not dtype.is_floating_point:
            raise OLMoConfigurationError(f"a norm's dtype must be floating-point, got {dtype}")
        self.size = size
        self.eps = eps
        self.full_precision = full_precision

        for name, present in (
            ("weight", elementwise_affine),
            ("bias", elementwise_affine and bias),
        ):
            empty = torch.empty(size, dtype=dtype, device=init_device) if present else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the weight to one and the bias to zero."""
        if self.weight is not None:
            self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def extra_repr(self) -> str:
        return (
            f"{self.size}, eps={self.eps}, elementwise_affine={self.weight is not None}, "
            f"bias={self.bias is not None}, full_precision={self.full_precision}"
        )

    def forward(self, x: Tensor, *, share: Share | None = None) -> Tensor:
        """Normalise the last dimension.

        :param x: (..., size), floating-point.
        :param share: Where the width is dealt to several ranks: sums a statistic over them,
            differentiably. The last dimension and the parameters are then this rank's part.
        :returns: (..., size) in ``x``'s dtype.
        :raises ValueError: If the last dimension is not ``size``.
        :raises TypeError: If ``x`` is not floating-point.
        """
        y = self._prepare(x, share)
        weight, bias = (_cast(p, y.dtype) for p in self._affine(x))
        if share is None:
            y = F.layer_norm(y, (self.size,), weight, bias, self.eps)
        else:
            y = y - share(y.sum(-1, keepdim=True)) / self.size
            y = self._normalize(y, share)
            y = y if weight is None else y * weight
            y = y if bias is None else y + bias
        return y.to(x.dtype)

    def _normalize(self, y: Tensor, share: Share | None = None) -> Tensor:
        """``y`` over its root mean square."""
        square = y.pow(2)
        if share is None:
            return y * torch.rsqrt(square.mean(-1, keepdim=True) + self.eps)
        return y * torch.rsqrt(share(square.sum(-1, keepdim=True)) / self.size + self.eps)

    def _affine(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias, plain where ``x`` is."""
        return local(self.weight, x), local(self.bias, x)

    def _prepare(self, x: Tensor, share: Share | None) -> Tensor:
        """``x`` in the dtype to compute in."""
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__} expected floating-point inputs, got {x.dtype}")
        if x.shape[-1] != self.size and share is None:
            raise ValueError(
                f"{type(self).__name__} expected a last dimension of {self.size}, "
                f"got an input of shape {tuple(x.shape)}"
            )
        return x.to(torch.promote_types(x.dtype, torch.float32)) if self.full_precision else x


class RMSNorm(LayerNorm):
    """Root mean square normalisation (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight + bias.

    Parameters as of :class:`LayerNorm`. The weight and the bias are applied before the result is
    cast back, as in OLMo 2.
    """

    def forward(self, x: Tensor, *, share: Share | None = None) -> Tensor:
        """Normalise the last dimension; see :meth:`LayerNorm.forward`."""
        if share is None and self._is_one_op(x):
            return F.rms_norm(x, (self.size,), self.weight, self.eps)
        y = self._prepare(x, share)
        weight, bias = self._affine(x)
        y = self._normalize(y, share)
        if weight is not None:
            y = y * weight.to(y.dtype)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return y.to(x.dtype)

    def _is_one_op(self, x: Tensor) -> bool:
        """Whether torch's own function takes the same steps, to the bit: half the time of a token.

        It does for one wide dtype on a CPU, and plain parameters.
        """
        if type(x) is not Tensor or not x.is_cpu or x.shape[-1] != self.size:
            return False
        weight = self.weight
        if weight is not None and (is_sharded(weight) or weight.dtype != x.dtype):
            return False
        return x.dtype in (torch.float32, torch.float64) and self.bias is None


class QwenRMSNorm(RMSNorm):
    """:class:`RMSNorm` that is cast back before the weight is applied.

    That is what Hugging Face's Llama and Qwen do; it differs from :class:`RMSNorm` by the rounding
    of low-precision inputs. The result has the input's dtype even if the weight's is wider.
    """

    def forward(self, x: Tensor, *, share: Share | None = None) -> Tensor:
        """Normalise the last dimension; see :meth:`LayerNorm.forward`."""
        if share is None and self._is_one_op(x):
            return F.rms_norm(x, (self.size,), self.weight, self.eps)
        y = self._prepare(x, share)
        weight, bias = self._affine(x)
        y = self._normalize(y, share).to(x.dtype)
        if weight is not None:
            y = weight * y
        if bias is not None:
            y = y + bias
        return y.to(x.dtype)


class FusedRMSNorm(RMSNorm):
    """:class:`RMSNorm` by torch's fused CUDA kernel where that computes the same.

    The kernel takes one dtype for input and weight, accumulates in float32 and has no bias. Any
    other case takes :class:`RMSNorm`'s path, with the same result.
    """

    def forward(self, x: Tensor, *, share: Share | None = None) -> Tensor:
        """Normalise the last dimension; see :meth:`LayerNorm.forward`."""
        same_dtype = self.weight is None or self.weight.dtype == x.dtype
        plain = share is None and self.bias is None and self.full_precision
        if x.is_cuda and same_dtype and plain:
            self._prepare(x, None)
            return F.rms_norm(x, (self.size,), self._affine(x)[0], self.eps)
        return super().forward(x, share=share)


class CuTeRMSNorm(RMSNorm):
    """:class:`RMSNorm` by QuACK's CuTe kernel (package ``quack-kernels``) on Hopper and later.

    Everywhere else, and for float64, it takes :class:`RMSNorm`'s path, with the same result.
    """

    def forward(self, x: Tensor, *, share: Share | None = None) -> Tensor:
        """Normalise the last dimension; see :meth:`LayerNorm.forward`."""
        if share is not None or not self._kernel_runs(x):
            return super().forward(x, share=share)
        from quack import rmsnorm  # type: ignore[import-not-found,unused-ignore]

        self._prepare(x, None)
        weight, bias = self._affine(x)
        y: Tensor = rmsnorm(x, weight, bias=bias, eps=self.eps)
        return y

    def _kernel_runs(self, x: Tensor) -> bool:
        tensors = [t for t in (x, self.weight, self.bias) if t is not None]
        return (
            _HAS_QUACK
            and self.full_precision
            and x.is_cuda
            and x.numel() > 0
            and all(t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in tensors)
            and torch.cuda.get_device_capability(x.device) >= (9, 0)
        )


class L2Norm(LayerNorm):
    """Scales to unit Euclidean length, without parameters; zero stays zero.

    :param size: The width: the last dimension of inputs.
    :param full_precision: Kept for symmetry: the length is never computed below float32.
    :param init_device: Accepted for symmetry; there is nothing to create.
    """

    def __init__(self, *, size: int, full_precision: bool = True, init_device: str = "cpu") -> None:
        super().__init__(
            size=size,
            eps=0.0,
            elementwise_affine=False,
            full_precision=full_precision,
            init_device=init_device,
        )

    def forward(self, x: Tensor, *, share: Share | None = None) -> Tensor:
        """Normalise the last dimension; see :meth:`LayerNorm.forward`."""
        self._prepare(x, share)
        if share is None:
            return l2_normalize(x)
        y = x.to(compute_dtype(x.dtype))
        square = share(y.pow(2).sum(-1, keepdim=True))
        return (y * torch.where(square > 0, square, 1).rsqrt()).to(x.dtype)


_CLASSES: dict[LayerNormType, type[LayerNorm]] = {
    LayerNormType.default: LayerNorm,
    LayerNormType.rms: RMSNorm,
    LayerNormType.fused_rms: FusedRMSNorm,
    LayerNormType.qwen_rms: QwenRMSNorm,
    LayerNormType.cute_rms: CuTeRMSNorm,
}


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)
