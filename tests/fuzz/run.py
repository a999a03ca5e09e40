"""Runs a case against the oracle: ``python -m fuzz.run SEED [--compile BACKEND]``.

Errors are compared with those of the oracle itself in the case's dtype: what a layer may be off by
is a few times what the plain computation is off by.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fuzz import oracle
from fuzz.options import Case, draw, simpler
from olmo_core.config import DType
from olmo_core.nn import attention
from olmo_core.nn.attention import AttentionConfig, GateConfig, GatedDeltaNetConfig
from olmo_core.nn.buffer_cache import BufferCache
from olmo_core.nn.layer_norm import LayerNormConfig
from olmo_core.nn.rope import RoPEConfig

__all__ = ["check", "check_seed"]

TIMES_REFERENCE = 8
"""How many times the reference's own error a result may be off by."""
SAMPLES = 6
"""How many such computations there are at most."""
FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
"""What it may be off by at least, relative to the norm of the output, or of all gradients."""


class Stack(nn.Module):
    """The layers of a case, one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, buffers: list[dict[str, Tensor]], **lengths: Any) -> Tensor:
        for layer, rope in zip(self.layers, buffers):
            x = layer(x, **rope, **lengths)
        return x

    def parameters_of(self, i: int, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of layer ``i``, under the names of its own state dict."""
        prefix = f"layers.{i}."
        return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


class Draws:
    """Random tensors of a case."""

    def __init__(self, case: Case) -> None:
        self.generator, self.noise = (torch.Generator().manual_seed(case.seed) for _ in range(2))
        self.case, self.dtype = case, getattr(torch, case.dtype)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def tokens(self, *shape: int) -> Tensor:
        x = self.normal(*shape)
        if self.case.extreme:
            x = self.normal(shape[-1]) + 0.01 * x
        x = x.to(self.dtype)
        if self.case.strided:
            x = x.transpose(0, 1).repeat_interleave(2, dim=-1)[..., ::2].transpose(0, 1)
        return x

    def rounded(self, x: Tensor) -> Tensor:
        """``x``, each element off by a rounding or less."""
        error = torch.rand(x.shape, generator=self.noise, dtype=torch.float64) * 2 - 1
        return (x.double() * (1 + error * torch.finfo(self.dtype).eps)).to(x.dtype)

    def lengths(self, values: list[int]) -> Tensor:
        if self.case.strided:
            return torch.tensor(values, dtype=torch.int32).repeat_interleave(2)[::2]
        return torch.tensor(values, dtype=torch.int32)

    def split(self, total: int, parts: int) -> list[int]:
        """Cumulative lengths of other documents, as many."""
        cuts = torch.randint(0, total + 1, (parts - 1,), generator=self.generator)
        return [0, *cuts.sort().values.tolist(), total]


def build(case: Case, draws: Draws) -> Stack:
    """The layers, with weights that leave none of them near a special case."""
    cache = BufferCache()
    stack = Stack([build_layer(case, spec, cache) for spec in case.layers])
    with torch.no_grad():
        for name, p in stack.named_parameters():
            values = draws.normal(*p.shape)
            if p.dim() > 1:
                p.copy_(values * p.shape[1:].numel() ** -0.5 * 1.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.3 * values)
            elif name.endswith((".sq", ".sk")):
                p.copy_(p.double() * (1 + 0.3 * values))
            elif name.endswith("A_log") and case.extreme:
                p.copy_(3 + values)
            else:
                p.copy_(0.5 * values)
        for layer in stack.layers if case.dtype != "float64" else ():
            if hasattr(layer, "k_conv1d"):
                # The first token's output is (q k) v, normalised: where q k is nearly 0, its sign,
                # and so everything after it, would be a matter of rounding.
                layer.w_k.weight += 2 * layer.w_q.weight
                layer.k_conv1d.weight += 2 * layer.q_conv1d.weight
    if case.frozen:
        for p in list(stack.parameters())[::2]:
            p.requires_grad_(False)
    # Dropout is for training alone; where it is drawn it must have no effect.
    return stack.train(not any("dropout" in spec for spec in case.layers))


def build_layer(case: Case, spec: dict[str, Any], cache: BufferCache) -> nn.Module:
    spec = dict(spec)
    mixer = spec.pop("mixer")
    for name, config in (("rope", RoPEConfig), ("gate", GateConfig), ("qk_norm", LayerNormConfig)):
        if name in spec:
            spec[name] = config.from_dict(spec[name])
    if not case.via_config:
        shared = {} if mixer == "GatedDeltaNet" else {"cache": cache}
        dtype = getattr(torch, case.dtype)
        return getattr(attention, mixer)(d_model=case.d_model, dtype=dtype, **shared, **spec)
    spec["dtype"] = DType(case.dtype)
    if mixer == "GatedDeltaNet":
        config = GatedDeltaNetConfig(**spec)
    else:
        names = {"Attention": "default", "NormalizedAttention": "normalized"}
        if "window_size" in spec:
            spec["sliding_window"] = attention.SlidingWindowAttentionConfig(
                pattern=[spec.pop("window_size")],
                force_full_attention_on_first_layer=False,
                force_full_attention_on_last_layer=False,
            )
        spec["name"] = names.get(mixer, "fused")
        config = AttentionConfig(**spec)
    layer = config.build(case.d_model, layer_idx=0, n_layers=1, cache=cache)
    assert sum(p.numel() for p in layer.parameters()) == config.num_params(case.d_model)
    return layer


def check(case: Case) -> None:
    """:raises AssertionError: If a number is wrong. Anything else that is raised is a crash."""
    draws = Draws(case)
    stack = build(case, draws)
    forward: Any = stack
    if case.compiler:
        torch._dynamo.reset()
        forward = torch.compile(stack, fullgraph=True, backend=case.compiler)
    if case.script:
        check_cached(case, draws, stack, forward)
    else:
        check_uncached(case, draws, stack, forward)


def check_uncached(case: Case, draws: Draws, stack: Stack, forward: Any) -> None:
    """Output and gradients for rows or documents."""
    x = draws.tokens(case.batch, case.seq_len, case.d_model).requires_grad_(not case.frozen)
    inputs = {"x": x, **dict(stack.named_parameters())}
    buffers = [buffers_of(case, spec) for spec in case.layers]
    lengths = lengths_of(case, draws)

    def call() -> Tensor:
        with autocast(case), no_grad(case) if case.inference else contextlib.nullcontext():
            if case.checkpoint:
                return checkpoint(forward, x, buffers, use_reentrant=False, **lengths)
            return forward(x, buffers, **lengths)

    if case.refilled:
        refill_after_another_call(lengths, call)
    y = call()
    names = [name for name, t in inputs.items() if t.requires_grad and not case.inference]
    # The gradient of a sum has strides of 0.
    dy = torch.ones(()).expand_as(y) if case.sum_loss else draws.normal(*y.shape)
    dy = dy / 1024 if case.dtype == "float16" else dy  # a gradient of 7e4 is infinite

    def with_gradients(out: Tensor, leaves: dict[str, Tensor]) -> list[Tensor]:
        wanted = [leaves[name] for name in names]
        return [out, *(torch.autograd.grad(out, wanted, dy.to(out.dtype)) if wanted else ())]

    def by_oracle(leaves: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
        return with_gradients(oracle_output(case, stack, leaves, dtype), leaves)

    what = ["output", *(f"gradient of {name}" for name in names)]
    compare(case, draws, what, with_gradients(y, inputs), inputs, by_oracle)


def check_cached(case: Case, draws: Draws, stack: Stack, forward: Any) -> None:
    """What comes out while tokens are fed and forgotten again."""
    stack.requires_grad_(False)
    longest = max(max(accumulate(case.script)), case.before[1] if case.before else 0)
    for layer in stack.layers:
        layer.init_kv_cache_manager(case.batch, longest, max_rollback=case.max_rollback)
    caches: list[Any] = [layer.kv_cache_manager for layer in stack.layers]
    no_buffers: list[dict[str, Tensor]] = [{} for _ in case.layers]

    def feed(x: Tensor, leftpad: list[int] | None) -> Tensor:
        if case.compiler:
            for cache in caches:
                cache.reserve(x.shape[1])
        lengths = {} if leftpad is None else {"cache_leftpad": draws.lengths(leftpad)}
        with autocast(case), no_grad(case):
            return forward(x, no_buffers, **lengths)

    if case.before:
        how, n = case.before
        pads = draws.split(n, case.batch + 1)[1:-1]
        if how == "refused":
            with pytest.raises(RuntimeError, match="decoding cache holds"):
                feed(draws.tokens(case.batch, longest + 1, case.d_model), pads)
        else:
            feed(draws.tokens(case.batch, n, case.d_model), pads)
            for cache in caches:
                cache.reset() if how == "reset" else cache.rollback(n)

    x = y = torch.empty(case.batch, 0, case.d_model)
    for n in case.script:
        if n > 0:
            new = draws.tokens(case.batch, n, case.d_model)
            pads = list(case.leftpad) if case.leftpad and not x.shape[1] else None
            x, y = joined(x, new), joined(y, feed(new, pads))
        else:
            compare_cached(case, draws, stack, x, y)
            for cache in caches:
                cache.rollback(-n)
            x, y = x[:, :n], y[:, :n]
    compare_cached(case, draws, stack, x, y)


def compare_cached(case: Case, draws: Draws, stack: Stack, x: Tensor, y: Tensor) -> None:
    def by_oracle(leaves: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        return [oracle_output(case, stack, leaves, dtype)]

    inputs = {"x": x, **dict(stack.named_parameters())}
    compare(case, draws, [f"output after {x.shape[1]} tokens"], [y], inputs, by_oracle)


def oracle_output(
    case: Case, stack: Stack, inputs: dict[str, Tensor], dtype: torch.dtype
) -> Tensor:
    """The output, each sequence by itself; padding gives 0.

    :param inputs: The tokens as ``x``, and all parameters.
    :param dtype: In which to compute.
    """
    batch, seq_len, _ = inputs["x"].shape
    tokens = inputs["x"].flatten(0, 1).to(dtype)
    # A gradient for each input, even where all tokens are padding.
    out = tokens * 0 + sum(t.sum() for t in inputs.values()).to(dtype) * 0
    for start, stop in sequences(case, batch, seq_len):
        rows = torch.arange(start, stop)
        position = rows - start if case.buffers_from is None else rows % seq_len + case.buffers_from
        y = tokens[rows]
        for i, spec in enumerate(case.layers):
            y = oracle.mix(spec, stack.parameters_of(i, inputs), y, position)
        out = out.index_copy(0, rows, y)
    return out.view(inputs["x"].shape)


def sequences(case: Case, batch: int, seq_len: int) -> Iterator[tuple[int, int]]:
    """Where each document, or each row after its padding, starts and ends in the flat batch."""
    if case.documents is None:
        for row, pad in enumerate(case.leftpad or (0,) * batch):
            if pad < seq_len:
                yield row * seq_len + pad, (row + 1) * seq_len
    else:
        yield from ((a, b) for a, b in pairwise(accumulate(case.documents, initial=0)) if a < b)


def lengths_of(case: Case, draws: Draws) -> dict[str, Any]:
    """The length keywords of ``forward``."""
    if case.leftpad is not None:
        return {"cache_leftpad": draws.lengths(list(case.leftpad))}
    if case.documents is None:
        return {}
    cu = draws.lengths([0, *accumulate(case.documents)])
    bound = {} if case.max_doc_len is None else {"max_doc_len": case.max_doc_len}
    return {"cu_doc_lens": cu, **bound}


def refill_after_another_call(lengths: dict[str, Any], call: Callable[[], Tensor]) -> None:
    """Let the lengths' tensor hold others for a call, then its own, and tell no version counter."""
    for name in lengths.keys() & {"cu_doc_lens", "cache_leftpad"}:
        tensor = lengths[name]
        own = tensor.clone()
        # The documents in the other order, or padding where another row has it.
        tensor.data.copy_(own[-1] - own.flip(0) if name == "cu_doc_lens" else own.roll(1))
        call()
        tensor.data.copy_(own)


def buffers_of(case: Case, spec: dict[str, Any]) -> dict[str, Tensor]:
    """The RoPE keywords of a layer's ``forward``."""
    rope = spec.get("rope")
    if rope is None or case.buffers_from is None:
        return {}
    if rope["no_global_rope"] and "window_size" not in spec:
        return {}
    head_dim = spec.get("head_dim", case.d_model // spec["n_heads"])
    rotary_dim = int(head_dim * rope["partial_rotary_factor"])
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    position = torch.arange(case.seq_len) + case.buffers_from
    cos, sin = (t.to(dtype) for t in oracle.rotations(rope, rotary_dim, position))
    if rope["name"] == "complex":
        return {"freqs_cis": torch.complex(cos, sin)}
    return {"pos_sin": torch.cat((sin, sin), -1), "pos_cos": torch.cat((cos, cos), -1)}


def autocast(case: Case) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext()


def no_grad(case: Case) -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad() if case.compiler else torch.inference_mode()


def joined(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat((old.to(new.dtype), new), 1)


def compare(
    case: Case,
    draws: Draws,
    what: list[str],
    got: list[Tensor],
    inputs: dict[str, Tensor],
    by_oracle: Callable[[dict[str, Tensor], torch.dtype], list[Tensor]],
) -> None:
    """:raises AssertionError: If an element of ``got`` is further from the truth than plain
    computations in the case's dtype are. One of them may be lucky; so where the first does not
    explain the error, more are made, of inputs that are off by a rounding.
    """
    dtype = torch.bfloat16 if case.autocast else getattr(torch, case.dtype)
    want = by_oracle({name: t.double() for name, t in inputs.items()}, torch.float64)
    assert [t.shape for t in got] == [t.shape for t in want]
    errors = distances(got, want)
    norms = [float(t.detach().norm()) for t in want]
    scales = [norms[0], *[math.hypot(*norms[1:])] * len(norms[1:])]
    reference = [0.0] * len(want)
    for sample in range(SAMPLES):
        near = {name: draws.rounded(t) if sample else t for name, t in inputs.items()}
        reference = list(map(max, reference, distances(by_oracle(near, dtype), want)))
        allowed = [TIMES_REFERENCE * r + FLOOR[dtype] * s for r, s in zip(reference, scales)]
        wrong = [i for i, error in enumerate(errors) if not error <= allowed[i]]  # NaN is wrong
        if not wrong:
            return
    i = wrong[0]
    raise AssertionError(
        f"{what[i]} is off by {errors[i]:.2g} of {norms[i]:.2g}; plain computations "
        f"in {dtype} are off by {reference[i]:.2g}, so {allowed[i]:.2g} would be allowed"
    )


def distances(a: list[Tensor], b: list[Tensor]) -> list[float]:
    return [float((x.detach().double() - y.detach()).norm()) for x, y in zip(a, b)]


def check_seed(seed: int, compiler: str | None = None) -> None:
    """:raises AssertionError: If the case fails in any way, with the way to run it again."""
    case = draw(seed, compiler)
    try:
        check(case)
    except Exception as error:
        smallest = shrink(case, error)
        flag = f" --compile {compiler}" if compiler else ""
        raise AssertionError(
            f"seed {seed} fails: {type(error).__name__}: {error}\n"
            f"the smallest case that fails so: {smallest}\n"
            f"run it again: PYTHONPATH=src:tests python -m fuzz.run {seed}{flag}"
        ) from error


def shrink(case: Case, error: Exception) -> Case:
    """A smaller case that raises the same type of error; Inductor is too slow for it."""
    if case.compiler == "inductor":
        return case
    for candidate in simpler(case):
        try:
            check(candidate)
        except Exception as other:
            if symptom(other) == symptom(error):
                return shrink(candidate, error)
    return case


def symptom(error: Exception) -> tuple[type, str]:
    """What two failures of the same cause have in common."""
    return type(error), str(error).split()[0] if str(error) else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seeds", nargs="+", help="a seed, or a range such as 0-299")
    parser.add_argument("--compile", metavar="BACKEND", help="aot_eager or inductor, for example")
    args = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    for word in args.seeds:
        first, _, last = word.partition("-")
        for seed in range(int(first), int(last or first) + 1):
            try:
                check_seed(seed, args.compile)
            except AssertionError as error:
                print(error, "\n")


if __name__ == "__main__":
    main()
