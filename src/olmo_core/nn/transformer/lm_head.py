"""From the residual stream to logits and the loss.

B: batch, T: sequence length, d: width of the residual stream (``d_model``), V: vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from olmo_core.nn.functional import compute_dtype
from olmo_core.nn.layer_norm import LayerNorm
from olmo_core.nn.linear import linear


class LMHead(nn.Module):
    """Final norm, output matrix, and the loss.

    In an nGPT there is no norm, and the logits, cosines, are scaled by a learned factor for each
    token, ``sz`` (arXiv:2410.01131, equation 3): it starts at 1 and is stored at the scale
    d^-1/2.

    :param norm: the final norm, built; an nGPT has none.
    :param tied: whether the embeddings serve as the output matrix.
    :param scaled: whether there is ``sz``.
    :param loss_chunk_size: compute the loss of this many tokens at a time.
    """

    def __init__(
        self,
        *,
        d_model: int,
        vocab_size: int,
        norm: LayerNorm | None,
        tied: bool = False,
        scaled: bool = False,
        loss_chunk_size: int | None = None,
        dtype: torch.dtype = torch.float32,
        init_device: str = "cpu",
    ) -> None:
        super().__init__()
        self.chunk_size = loss_chunk_size
        self.sz_scale = d_model**-0.5
        self.norm = norm
        self.sz: nn.Parameter | None = None
        if scaled:
            self.sz = nn.Parameter(torch.empty(vocab_size, dtype=dtype, device=init_device))
        self.w_out: nn.Linear | None = None
        if not tied:
            self.w_out = nn.Linear(d_model, vocab_size, False, init_device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set all but the matrix to where it starts."""
        if self.sz is not None:
            self.sz.fill_(self.sz_scale)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        """Logits: (..., d) -> (..., V). ``embeddings`` (V, d) serve if there is no own matrix."""
        if self.norm is not None:
            x = self.norm(x)
        logits = linear(x, embeddings if self.w_out is None else self.w_out.weight)
        if self.sz is not None:
            logits = logits * (self.sz / self.sz_scale)
        return logits

    def loss(self, x: Tensor, embeddings: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """The summed cross-entropy in float32 (float64 for float64 inputs).

        :param x: (B, T, d).
        :param labels: (B, T) int64.
        """
        x, labels = x.flatten(0, 1), labels.flatten()
        if self.chunk_size is None or self.chunk_size >= x.shape[0]:
            return self._loss(x, embeddings, labels, ignore_index)
        from torch.utils.checkpoint import checkpoint

        chunks = zip(x.split(self.chunk_size), labels.split(self.chunk_size), strict=True)
        losses = [
            checkpoint(self._loss, part, embeddings, wanted, ignore_index, use_reentrant=False)
            for part, wanted in chunks
        ]
        return torch.stack(losses).sum()

    def _loss(self, x: Tensor, embeddings: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        logits = self(x, embeddings)
        logits = logits.to(compute_dtype(logits.dtype))
        return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
