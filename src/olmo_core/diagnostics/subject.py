"""One layer with weights and inputs drawn, and its answers by definition.

All values are drawn so that every floating dtype holds them exactly: the float64 answer is then the
truth for each of them, and computed once.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache, cached_property

import torch
from torch import Tensor

from olmo_core.diagnostics.measures import Comparison, bound, reference_dtype
from olmo_core.diagnostics.mixers import N_HEADS, Mixer
from olmo_core.nn.attention.base import SequenceMixer
from olmo_core.nn.functional import row_error

__all__ = ["BATCH", "DOCUMENTS", "LEFT_PADDING", "RANKS", "TOKENS", "Answer", "Subject"]

BATCH, TOKENS = 2, 173
DOCUMENTS = (1, 9, 0, 31, 2, 150, 1, 1, 70, 81)
"""Lengths of the packed documents: one crosses the rows' border, some hold one token, one none."""
LEFT_PADDING = (0, 41)
RANKS = 2

Answer = dict[str, Tensor]
"""A forward and backward: ``out``, ``dx``, and ``d NAME`` of each parameter."""


class Subject:
    """A mixer on a device.

    :param ranks: How many share it where it is sharded.
    """

    def __init__(self, mixer: Mixer, head_dim: int, device: torch.device, ranks: int = RANKS):
        assert sum(DOCUMENTS) == BATCH * TOKENS
        self.mixer, self.head_dim, self.device, self.ranks = mixer, head_dim, device, ranks
        self.d_model = N_HEADS * head_dim
        self._exact_device = torch.device("cpu") if device.type == "mps" else device

    @cached_property
    def x(self) -> Tensor:
        """(BATCH, TOKENS, d_model), float64."""
        return _draw("x", (BATCH, TOKENS, self.d_model)).to(self._exact_device)

    @cached_property
    def dout(self) -> Tensor:
        """The gradient of the output: like ``x``."""
        return _draw("dout", (BATCH, TOKENS, self.d_model)).to(self._exact_device)

    @cached_property
    def params(self) -> dict[str, Tensor]:
        """All parameters by name, float64, in sizes that keep scores near one."""
        layer = self.mixer.build(self.head_dim, torch.float32, torch.device("cpu"), "torch")
        drawn = {}
        for name, p in layer.named_parameters():
            values = _draw(name, tuple(p.shape))
            if name.endswith("norm.weight"):
                values = _representable(1 + 0.25 * values)
            elif name in ("sq", "sk"):  # small: the factor of the scores is sqrt(head_dim)
                small = (self.d_model * self.head_dim) ** -0.5
                values = _representable((1 + 0.25 * values) * small)
            elif name == "A_log":  # states that live for some ten tokens
                values = _representable(-1.5 - values.abs())
            elif p.dim() > 1:
                values = _representable(values * p[0].numel() ** -0.5)
            drawn[name] = values.to(self._exact_device)
        return drawn

    def layer(self, backend: str, dtype: torch.dtype) -> SequenceMixer:
        """The code under test, in training mode, with these weights."""
        layer = self.mixer.build(self.head_dim, dtype, self.device, backend)
        with torch.no_grad():
            for name, p in layer.named_parameters():
                p.copy_(self.params[name])
        return layer

    def cu_doc_lens(self) -> Tensor:
        """The documents as the layers take them."""
        ends = torch.tensor([0, *DOCUMENTS]).cumsum(0)
        return ends.to(self.device, torch.int32)

    def document(self, problem: str) -> Tensor:
        """Of each token: for ``whole``, ``documents`` or ``left_padding``."""
        match problem:
            case "whole":
                numbers = torch.arange(BATCH).repeat_interleave(TOKENS)
            case "documents":
                numbers = torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))
            case _:
                numbers = torch.arange(BATCH).repeat_interleave(TOKENS).view(BATCH, TOKENS)
                for row, pad in enumerate(LEFT_PADDING):
                    numbers[row, :pad] = -1 - row
                numbers = numbers.flatten()
        return numbers.to(self._exact_device)

    @cache  # noqa: B019 - a subject lives as long as its answers are needed
    def truth(self, problem: str) -> Answer:
        """The reference's answer in float64."""
        return self._reference(problem, torch.float64, self._exact_device)

    @cache  # noqa: B019
    def plain_errors(self, problem: str, dtype: torch.dtype) -> dict[str, float]:
        """The error of each tensor of the plain reference's answer in ``dtype``.

        The gradients of all matrices share their largest, and so do those of all vectors: they are
        sums over all tokens, which cancel more or less by luck.
        """
        plain = self._reference(problem, dtype, self.device)
        truth = self.truth(problem)
        kinds = {name: (name[:2] == "d ", want.dim() > 1) for name, want in truth.items()}
        errors = {name: row_error(plain[name], want) for name, want in truth.items()}
        largest: dict[tuple[bool, bool], float] = {}
        for name, kind in kinds.items():
            largest[kind] = max(largest.get(kind, 0.0), errors[name])
        return {n: largest[kinds[n]] if kinds[n][0] else error for n, error in errors.items()}

    def _reference(self, problem: str, dtype: torch.dtype, device: torch.device) -> Answer:
        def forward(x: Tensor) -> Tensor:
            document = self.document(problem).to(device)
            out = self.mixer.reference(self.head_dim, params, x.flatten(0, 1), document)
            return out.view(x.shape)

        # Norms and the delta net's decay keep float32 in a layer of lower precision.
        wide = torch.promote_types(dtype, torch.float32)
        params = {
            name: p.to(device, wide if _stays_wide(name) else dtype).requires_grad_()
            for name, p in self.params.items()
        }
        x, dout = (y.to(device, dtype) for y in (self.x, self.dout))
        return answer(forward, x, dout, params)

    def compare(
        self, got: Answer, want: Answer, problem: str, dtype: torch.dtype
    ) -> list[Comparison]:
        """Each tensor of ``got`` against ``want``, with the bound that ``problem`` allows it."""
        errors = self.plain_errors(problem, reference_dtype(dtype))
        return [
            Comparison(n, row_error(got[n], want[n]), bound(errors[n], dtype, y.dtype))
            for n, y in got.items()
        ]


def answer(
    forward: Callable[[Tensor], Tensor], x: Tensor, dout: Tensor, params: dict[str, Tensor]
) -> Answer:
    """The output and all gradients of ``forward`` at ``x``."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        out = forward(x)
        grads = torch.autograd.grad(out, [x, *params.values()], dout)
    names = ["dx", *(f"d {name}" for name in params)]
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def _stays_wide(name: str) -> bool:
    return "norm." in name or name in ("A_log", "dt_bias")


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return _representable(torch.randn(shape, generator=generator, dtype=torch.float64))


def _representable(x: Tensor) -> Tensor:
    """Rounded to values that bfloat16 and float16 both hold."""
    return x.bfloat16().half().double()
