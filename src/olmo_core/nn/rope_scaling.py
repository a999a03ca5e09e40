"""Ways to stretch RoPE to longer contexts: each changes the rotation frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from olmo_core.config import Config, Registrable
from olmo_core.exceptions import OLMoConfigurationError

__all__ = [
    "ABFRoPEScalingConfig",
    "PIRoPEScalingConfig",
    "RoPEScalingConfig",
    "StepwiseRoPEScalingConfig",
    "YaRNRoPEScalingConfig",
    "inverse_frequencies",
]


def inverse_frequencies(theta: float, dim: int) -> Tensor:
    """theta^(-2i / dim) for i in [0, dim / 2): radians per position, float64, (dim / 2,)."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)


@dataclass
class RoPEScalingConfig(Config, Registrable):
    """Base class of the scalings. As a dictionary, ``type`` chooses one by name."""

    def compute_inv_freqs(self, theta: float, dim: int) -> Tensor:
        """The scaled frequencies.

        :param theta: The base of the unscaled frequencies.
        :param dim: The number of rotated dimensions of a head.
        :returns: (dim / 2,), float64, radians per position.
        """
        raise OLMoConfigurationError(
            f"{type(self).__name__} defines no scaling; use one of the types "
            f"{', '.join(RoPEScalingConfig.get_registered_names())}"
        )

    @property
    def rescale_factor(self) -> float:
        """The factor of the rotated queries and keys, each; logits change by its square."""
        factor = float(getattr(self, "attention_rescale_factor", 1.0))
        if not factor > 0:
            raise OLMoConfigurationError(f"attention_rescale_factor must be positive, got {factor}")
        return factor


def _check_positive(config: RoPEScalingConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise OLMoConfigurationError(
                f"{type(config).__name__}.{name} must be positive, got {value}"
            )


@RoPEScalingConfig.register("abf")
@dataclass
class ABFRoPEScalingConfig(RoPEScalingConfig):
    """Adjusted base frequency (arXiv:2309.16039): another ``theta``."""

    new_theta: float = 8_000_000
    """The base that replaces ``theta``."""
    attention_rescale_factor: float = 1.0
    """The factor of the rotated queries and keys."""

    def compute_inv_freqs(self, theta: float, dim: int) -> Tensor:
        _check_positive(self, "new_theta")
        return inverse_frequencies(self.new_theta, dim)


@RoPEScalingConfig.register("pi")
@dataclass
class PIRoPEScalingConfig(RoPEScalingConfig):
    """Position interpolation (arXiv:2306.15595): positions divided by ``factor``.

    Hugging Face calls it "linear".
    """

    factor: float = 2.0
    """How many times longer the context becomes."""
    attention_rescale_factor: float = 1.0
    """The factor of the rotated queries and keys."""

    def compute_inv_freqs(self, theta: float, dim: int) -> Tensor:
        _check_positive(self, "factor")
        return inverse_frequencies(theta, dim) / self.factor


@RoPEScalingConfig.register("stepwise")
@dataclass
class StepwiseRoPEScalingConfig(RoPEScalingConfig):
    """Llama 3.1's scaling: low frequencies are interpolated, high ones kept, those between blended.

    A frequency is judged by its wavelength, 2π / frequency, as a proportion of the old context:

    - below ``high_freq_proportion``: kept;
    - above ``1 - low_freq_proportion``: divided by ``factor``;
    - between: blended linearly in the frequency.

    The defaults are Llama 3.2's published scaling: ``low_freq_factor=1``, ``high_freq_factor=4``.
    In general ``high_freq_proportion = 1 / high_freq_factor`` and
    ``low_freq_proportion = 1 - 1 / low_freq_factor``.
    """

    factor: float = 32.0
    """How many times longer the context becomes."""
    low_freq_proportion: float = 0.0
    """How far below the old context, as a part of it, wavelengths still count as long: [0, 1)."""
    high_freq_proportion: float = 0.25
    """Wavelengths below this part of the old context are kept: (0, 1 - low_freq_proportion)."""
    old_context_len: int = 8192
    """The context that the model was trained with, in tokens."""
    attention_rescale_factor: float = 1.0
    """The factor of the rotated queries and keys."""

    def compute_inv_freqs(self, theta: float, dim: int) -> Tensor:
        _check_positive(self, "factor", "old_context_len", "high_freq_proportion")
        long = 1 - self.low_freq_proportion
        if not self.high_freq_proportion < long <= 1:
            raise OLMoConfigurationError(
                "stepwise RoPE scaling needs 0 <= low_freq_proportion and high_freq_proportion < "
                f"1 - low_freq_proportion, got {self.low_freq_proportion} and "
                f"{self.high_freq_proportion}"
            )
        inv_freqs = inverse_frequencies(theta, dim)
        # Rotations within the old context: the reciprocal of the wavelength's proportion.
        rotations = self.old_context_len * inv_freqs / (2 * math.pi)
        low, high = 1 / long, 1 / self.high_freq_proportion
        kept = ((rotations - low) / (high - low)).clamp(0, 1)
        return inv_freqs * (kept + (1 - kept) / self.factor)


@RoPEScalingConfig.register("yarn")
@dataclass
class YaRNRoPEScalingConfig(RoPEScalingConfig):
    """YaRN (arXiv:2309.00071): frequencies blended by dimension, and attention rescaled."""

    factor: float = 8.0
    """How many times longer the context becomes."""
    beta_fast: float = 32
    """Dimensions that turn more often than this in the old context are kept."""
    beta_slow: float = 1
    """Dimensions that turn less often than this are divided by ``factor``."""
    old_context_len: int = 8192
    """The context that the model was trained with, in tokens."""

    @property
    def attention_rescale_factor(self) -> float:
        """0.1 * ln(factor) + 1, and 1 where the context does not grow."""
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    def compute_inv_freqs(self, theta: float, dim: int) -> Tensor:
        _check_positive(self, "factor", "beta_fast", "beta_slow", "old_context_len")
        if self.beta_slow > self.beta_fast:
            raise OLMoConfigurationError(
                f"YaRN needs beta_slow <= beta_fast, got {self.beta_slow} > {self.beta_fast}"
            )

        def dimension(rotations: float) -> float:
            """The dimension whose frequency makes so many rotations within the old context."""
            wavelength = self.old_context_len / rotations
            return dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

        first = max(math.floor(dimension(self.beta_fast)), 0)
        last = min(math.ceil(dimension(self.beta_slow)), dim - 1)
        # A ramp of no width would divide by zero; this is the reference implementation's guard.
        width = last - first if last != first else 0.001
        index = torch.arange(dim // 2, dtype=torch.float64, device="cpu")
        interpolated = ((index - first) / width).clamp(0, 1)
        inv_freqs = inverse_frequencies(theta, dim)
        return inv_freqs * (1 - interpolated + interpolated / self.factor)
