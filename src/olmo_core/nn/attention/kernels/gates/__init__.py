"""Gates: of the gated delta net's step sizes and decays, of its norm, and of attention's output."""

from .op import (
    GATED_NORM,
    GATES,
    SIGMOID_GATE,
    decay_gates,
    decay_gates_ahead,
    gated_norm_ahead,
    gated_rms_norm,
    sigmoid_gate,
)

__all__ = [
    "GATED_NORM",
    "GATES",
    "SIGMOID_GATE",
    "decay_gates",
    "decay_gates_ahead",
    "gated_norm_ahead",
    "gated_rms_norm",
    "sigmoid_gate",
]
