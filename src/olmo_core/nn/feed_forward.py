"""Gated feed-forward layers (arXiv:2002.05202), and their form in nGPT (arXiv:2410.01131)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.config import Config, DType, StrEnum
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.functional import l2_normalize
from olmo_core.nn.init import InitMethod
from olmo_core.nn.linear import apply_linear, apply_linears
from olmo_core.nn.sharded import local
from olmo_core.nn.tensor_parallel import SharesWidth, TensorParallelTable

__all__ = [
    "Activation",
    "FeedForward",
    "FeedForwardConfig",
    "FeedForwardType",
    "NormalizedFeedForward",
]


class FeedForwardType(StrEnum):
    """The feed-forward layers by name."""

    default = "default"
    """:class:`FeedForward`"""
    normalized = "normalized"
    """:class:`NormalizedFeedForward`"""


class Activation(StrEnum):
    """What the gate goes through."""

    silu = "silu"
    """x * sigmoid(x): SwiGLU."""
    gelu = "gelu"
    """x * Phi(x) with the normal distribution function: GEGLU."""
    gelu_tanh = "gelu_tanh"
    """The tanh approximation of GELU, as in Gemma."""


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.silu: F.silu,
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: partial(F.gelu, approximate="tanh"),
}


@dataclass
class FeedForwardConfig(Config):
    """Builds any feed-forward layer."""

    hidden_size: int
    """The width of the hidden layer."""
    name: FeedForwardType = FeedForwardType.default
    """Which layer."""
    bias: bool | None = None
    """Whether the linear layers have biases; None means no."""
    dtype: DType = DType.float32
    """The parameters' type."""
    activation: Activation = Activation.silu
    """What the gate goes through; ``normalized`` has silu alone."""

    def num_params(self, d_model: int) -> int:
        """The number of parameters of the layer that :meth:`build` makes.

        :param d_model: The width of inputs and outputs.
        """
        return sum(p.numel() for p in self.build(d_model, init_device="meta").parameters())

    def build(self, d_model: int, *, init_device: str = "cpu") -> FeedForward:
        """Build the layer.

        :param d_model: The width of inputs and outputs.
        :param init_device: Where to create the parameters, e.g. "cpu" or "meta".
        :raises OLMoConfigurationError: For a size below 1, or a bias or another activation with
            ``normalized``.
        """
        if self.name == FeedForwardType.normalized:
            if self.bias:
                raise OLMoConfigurationError(
                    "the normalized feed-forward has no biases: leave bias unset"
                )
            if self.activation != Activation.silu:
                raise OLMoConfigurationError(
                    f"the normalized feed-forward has silu alone, got {self.activation}"
                )
            return NormalizedFeedForward(
                d_model=d_model,
                hidden_size=self.hidden_size,
                dtype=self.dtype.as_pt(),
                init_device=init_device,
            )
        return FeedForward(
            d_model=d_model,
            hidden_size=self.hidden_size,
            bias=bool(self.bias),
            activation=self.activation,
            dtype=self.dtype.as_pt(),
            init_device=init_device,
        )


class FeedForward(SharesWidth):
    """A gated unit: w2(activation(w1(x)) * w3(x)); with silu it is SwiGLU.

    :param d_model: The width of inputs and outputs.
    :param hidden_size: The width of the hidden layer.
    :param bias: Whether the linear layers have biases.
    :param activation: What the gate goes through.
    :param dtype: The parameters' type.
    :param init_device: Where to create the parameters.
    :raises OLMoConfigurationError: For a size below 1.
    """

    def __init__(
        self,
        *,
        d_model: int,
        hidden_size: int,
        bias: bool = False,
        activation: Activation = Activation.silu,
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
    ) -> None:
        super().__init__()
        if d_model < 1 or hidden_size < 1:
            raise OLMoConfigurationError(
                f"d_model and hidden_size must be at least 1, got {d_model} and {hidden_size}"
            )
        self.d_model = d_model
        self.hidden_size = hidden_size
        self.activation = Activation(activation)
        self._act = _ACTIVATIONS[self.activation]

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=bias, dtype=dtype, device=init_device)

        self.w1 = linear(d_model, hidden_size)
        self.w2 = linear(hidden_size, d_model)
        self.w3 = linear(d_model, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position.

        :param x: (..., d_model).
        :returns: (..., d_model).
        """
        gate, hidden = apply_linears((self.w1, self.w3), x)
        return apply_linear(self.w2, self._act(gate) * hidden)

    def tensor_parallel_table(self) -> TensorParallelTable:
        return TensorParallelTable(
            columns=("w1", "w3"),
            rows=("w2",),
            shards=("sw1", "sw3"),
            counts={"hidden_size": self.hidden_size},
        )

    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise all parameters; see :meth:`InitMethod.init_linear_`."""
        for linear in (self.w1, self.w2, self.w3):
            init_method.init_linear_(
                linear.weight,
                linear.bias,
                d_model=d_model,
                block_idx=block_idx,
                num_blocks=num_blocks,
                std=std,
                output=linear is self.w2,
                generator=generator,
            )

    def num_flops_per_token(self, seq_len: int) -> int:
        """FLOPs per token, forward and backward: 6 per parameter of a matrix.

        :param seq_len: Has no effect; every layer's method takes it.
        """
        del seq_len
        return 6 * sum(w.weight.numel() for w in (self.w1, self.w2, self.w3))


class NormalizedFeedForward(FeedForward):
    """nGPT's SwiGLU: w2(silu(sw1 * sqrt(d_model) * w1(x)) * (sw3 * w3(x))), without biases.

    ``sw1`` and ``sw3`` are learned, (hidden_size,), and start at one. sqrt(d_model) brings the
    product of two unit vectors back to unit variance, where the gate is not linear. Matrices are
    kept at unit length by :meth:`normalize_matrices`.

    Parameters as of :class:`FeedForward`.
    """

    def __init__(
        self,
        *,
        d_model: int,
        hidden_size: int,
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
    ) -> None:
        super().__init__(
            d_model=d_model, hidden_size=hidden_size, dtype=dtype, init_device=init_device
        )
        self.sw1 = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=init_device))
        self.sw3 = nn.Parameter(torch.empty(hidden_size, dtype=dtype, device=init_device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the scales to one."""
        self.sw1.fill_(1)
        self.sw3.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to each position; see :meth:`FeedForward.forward`."""
        gate, hidden = apply_linears((self.w1, self.w3), x)
        gate = gate * (local(self.sw1) * math.sqrt(self.d_model))
        hidden = F.silu(gate) * (hidden * local(self.sw3))
        return apply_linear(self.w2, hidden.to(x.dtype))

    def init_weights(
        self,
        *,
        init_method: InitMethod,
        d_model: int,
        block_idx: int,
        num_blocks: int,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        """Initialise all parameters, and normalise the matrices."""
        super().init_weights(
            init_method=init_method,
            d_model=d_model,
            block_idx=block_idx,
            num_blocks=num_blocks,
            std=std,
            generator=generator,
        )
        self.reset_parameters()
        self.normalize_matrices()

    @torch.no_grad()
    def normalize_matrices(self) -> None:
        """Scale each vector of length d_model to unit length; call it after each optimiser step.

        Rows of ``w1`` and ``w3``, columns of ``w2``; a zero vector stays zero. Works on shards.
        """
        for linear, dim in ((self.w1, 1), (self.w3, 1), (self.w2, 0)):
            linear.weight.copy_(l2_normalize(linear.weight, dim=dim))
