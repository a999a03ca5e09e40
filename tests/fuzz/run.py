"""Runs cases against the oracle: ``python -m fuzz.run SEED [--compile BACKEND]``."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fuzz import oracle
from fuzz.build import Draws, Stack, build
from fuzz.options import Case, draw, simpler
from fuzz.tolerance import compare

__all__ = ["check", "check_seed"]


def check(case: Case) -> None:
    """:raises AssertionError: If a number is wrong. Anything else that is raised is a crash."""
    draws = Draws(case)
    stack = build(case, draws)
    forward: Any = stack
    if case.compiler:
        torch._dynamo.reset()
        forward = torch.compile(stack, fullgraph=True, backend=case.compiler)
    with warnings.catch_warnings():
        # Of buffers that are complex, which is what complex RoPE takes.
        warnings.filterwarnings("ignore", "Torchinductor does not support code generation for comp")
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
    compare(draws, plain_dtype(case), what, with_gradients(y, inputs), inputs, by_oracle)


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
    what = [f"output after {x.shape[1]} tokens"]
    compare(draws, plain_dtype(case), what, [y], inputs, by_oracle)


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


def plain_dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.autocast else getattr(torch, case.dtype)


def no_grad(case: Case) -> contextlib.AbstractContextManager[Any]:
    return torch.no_grad() if case.compiler else torch.inference_mode()


def joined(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat((old.to(new.dtype), new), 1)


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
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
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
