"""Float8 projections that are dealt to ranks: dealt = the same float8 layer on one rank."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from gloo_ranks import on_ranks
from nn.attention.parallel.sharing import RMS, ROPE, Block, D, check_gradients, error, mesh_of
from olmo_core.nn.attention import Attention, GateConfig, GatedDeltaNet, NormalizedAttention
from olmo_core.nn.feed_forward import FeedForward, NormalizedFeedForward
from olmo_core.nn.float8 import float8_styles
from olmo_core.nn.tensor_parallel import SharesWidth

needs_torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="torchao is not installed: pip install torchao"
)
SIZES: dict[str, Any] = {"d_model": D, "n_heads": 4, "dtype": torch.float64}
BOUND = 1e-6  # torchao's emulation multiplies in float32
LAYERS: dict[str, Callable[[], SharesWidth]] = {
    # The gate has an output a head: too narrow for float8, so it is not converted.
    "everything": lambda: Attention(
        **SIZES, n_kv_heads=2, qk_norm=RMS, rope=ROPE, gate=GateConfig(), window_size=5
    ),
    "ngpt": lambda: NormalizedAttention(**SIZES),
    "delta net": lambda: GatedDeltaNet(**SIZES),
    "swiglu": lambda: FeedForward(d_model=D, hidden_size=64, bias=True, dtype=torch.float64),
    "ngpt ff": lambda: NormalizedFeedForward(d_model=D, hidden_size=64, dtype=torch.float64),
}


EMULATED: Any = object()


def make(name: str, config: Any = EMULATED) -> Any:
    """The same on all ranks.

    :param config: Of the float8 projections; None for none.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    layer = LAYERS[name]()
    if config is EMULATED:
        config = Float8LinearConfig(emulate=True)  # no hardware is needed
    if config is not None:
        wide = lambda linear, _: linear.out_features % 16 == 0  # noqa: E731
        convert_to_float8_training(layer, config=config, module_filter_fn=wide)
    return layer


def run(layer: nn.Module, x: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(dout)
    assert x.grad is not None
    return out.detach(), x.grad


def dealt(rank: int, n: int, name: str) -> None:
    from torch.distributed.tensor import Shard

    x, dout = torch.randn(
        2, 2, 8, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    plain, whole = make(name, None), make(name)
    seen: dict[str, Tensor] = {}
    for path, module in whole.named_modules():
        if isinstance(module, nn.Linear):
            module.register_full_backward_hook(
                lambda m, _, douts, path=path: seen.update({path: douts[0]})
            )
    want = run(whole, x, dout)
    assert all(error(a, b) > 1e-3 for a, b in zip(want, run(plain, x, dout)))  # it is float8
    for layout in (None, Shard(1)):
        layer = make(name)
        layer.apply_tp(mesh_of(n), layout, float8_enabled=True)
        cut = (lambda t: t) if layout is None else (lambda t: t.chunk(n, 1)[rank].contiguous())
        got = run(layer, cut(x), dout)
        assert error(got[0], want[0]) < BOUND, name
        assert error(got[1], cut(want[1])) < BOUND, name
        for (path, p), q in zip(layer.named_parameters(), whole.parameters(), strict=True):
            assert p.grad.placements == p.placements
            off = (p.grad.full_tensor() - q.grad).abs()
            module, _, kind = path.rpartition(".")
            if kind == "bias" and module in seen:
                # torchao's styles sum gradients that are rounded to float8 (e5m2: by an eighth at
                # most); one rank sums those of before.
                assert off.max() > 0
                assert (off <= seen[module].abs().sum((0, 1)) / 8).all(), path
            else:
                assert off.max() / q.grad.abs().max().clamp_min(1) < BOUND, (name, path)


@needs_torchao
@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYERS)
def test_dealt_is_whole(name: str) -> None:
    on_ranks(2, dealt, name)


def with_fsdp(rank: int, n: int) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = mesh_of(2, 2, names=("dp", "tp"))
    mine = mesh["dp"].get_local_rank()
    x = torch.randn(2, 1, 8, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name in ("ngpt", "delta net"):
        reference, block = Block(make(name)), Block(make(name))
        block.mixer.apply_tp(mesh["tp"], float8_enabled=True)
        fully_shard(block, mesh=mesh["dp"])
        want = [reference(one) for one in x]
        (sum(y.square().sum() for y in want) / 2).backward()
        out = block(x[mine])
        out.square().sum().backward()
        assert error(out, want[mine]) < BOUND, name
        check_gradients(block, reference, BOUND)


@needs_torchao
@pytest.mark.distributed
def test_fsdp_around_it() -> None:
    on_ranks(4, with_fsdp)


def with_own_scaling(rank: int, n: int) -> None:
    """By plain styles: float8 as the layer's configuration says, biases included."""
    from torchao.float8 import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear

    x, dout = torch.randn(
        2, 2, 8, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp"):
        config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
        whole, layer = make("swiglu", config), make("swiglu", config)
        if recipe != "tensorwise":
            with pytest.raises(ValueError, match=r"w1 of FeedForward has .*axiswise"):
                layer.apply_tp(mesh_of(n), float8_enabled=True)
        layer.apply_tp(mesh_of(n))
        assert isinstance(layer.w1, Float8Linear)
        for got, want in zip(run(layer, x, dout), run(whole, x, dout)):
            assert error(got, want) < BOUND, recipe
        check_gradients(layer, whole, BOUND)


@needs_torchao
@pytest.mark.distributed
def test_other_scalings_by_plain_styles() -> None:
    on_ranks(2, with_own_scaling)


def refusals(rank: int, n: int) -> None:
    from torch.distributed.tensor import Shard
    from torchao.float8 import Float8LinearConfig

    mesh = mesh_of(n)
    layer = make("ngpt", None)
    with pytest.raises(RuntimeError, match=r"none of NormalizedAttention's projections \(w_q, "):
        layer.apply_tp(mesh, float8_enabled=True)
    assert type(layer.w_q.weight) is nn.Parameter  # as it was
    with pytest.raises(RuntimeError, match="gloo can't gather float8"):
        make("ngpt").apply_tp(mesh, None, Shard(1), float8_enabled=True)
    rounded = Float8LinearConfig(emulate=True, round_scales_to_power_of_2=True)
    with pytest.raises(ValueError, match="w_q of NormalizedAttention has round_scales"):
        make("ngpt", rounded).apply_tp(mesh, float8_enabled=True)


@needs_torchao
@pytest.mark.distributed
def test_what_torchao_s_styles_do_not_follow() -> None:
    on_ranks(2, refusals)


def test_torchao_is_missing() -> None:
    layer = LAYERS["ngpt"]()
    with (
        mock.patch.dict(sys.modules, {"torchao.float8.float8_linear": None}),
        pytest.raises(RuntimeError, match="pip install torchao"),
    ):
        float8_styles(layer, ["w_q"], mock.Mock())
