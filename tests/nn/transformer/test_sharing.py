"""A model whose layers several ranks share."""

from __future__ import annotations

import pytest
import torch

from gloo_ranks import on_ranks
from nn.attention.parallel.sharing import error, mesh_of, whole
from olmo_core.nn.attention import AttentionConfig, GatedDeltaNetConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig

pytestmark = pytest.mark.distributed


def config(heads: int = 4) -> TransformerConfig:
    mixers = [GatedDeltaNetConfig(n_heads=2, head_dim=8), AttentionConfig(n_heads=heads)]
    return TransformerConfig(
        d_model=24, vocab_size=50, n_layers=2, dtype="float64",
        blocks=[TransformerBlockConfig(sequence_mixer=mixer) for mixer in mixers],
    )  # fmt: skip


def shares(rank: int, n: int) -> None:
    mesh = mesh_of(n, names=("tp",))["tp"]
    one, many = config().build(), config().build(init_device="meta")
    one.init_weights(seed=3)
    many.apply_tp(mesh)
    many = many.to_empty(device="cpu")
    many.init_weights(seed=3)
    ids = torch.randint(50, (2, 15), generator=torch.Generator().manual_seed(1))
    cu = torch.tensor([0, 4, 15, 30], dtype=torch.int32)
    losses = [model(ids, labels=ids, cu_doc_lens=cu) for model in (one, many)]
    assert abs(losses[0] - losses[1]) < 1e-12
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(many.named_parameters(), one.parameters(), strict=True):
        assert torch.equal(whole(p), q), name
        assert error(whole(p.grad), q.grad) < 1e-12, name
    assert many.num_params() == one.num_params()
    assert many.num_flops_per_token(15) == one.num_flops_per_token(15)

    refused = config(heads=3).build()
    with pytest.raises(ValueError, match="can't deal n_heads=3 to 2 ranks"):
        refused.apply_tp(mesh)
    assert all(mixer.tensor_parallel is None for mixer in refused.mixers)  # nor the first layer


def test_ranks_that_share_every_layer_are_one_process() -> None:
    on_ranks(2, shares)
