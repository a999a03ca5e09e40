"""Calls that cannot be honoured: each raises, of the right type, and says what to look at.

A message names the argument and what came; nothing is computed and nothing crashes. The cases are
lambdas in tables, so that a new one is one line.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nn.attention.bad_calls import (
    CONFIG,
    CONFIGURATION,
    INPUTS,
    LENGTHS,
    ROPE,
    VALUE_OR_TYPE,
    Case,
    H,
    T,
    backend,
    cached,
    cu,
    layer,
    qkv,
    twice,
    x,
)
from olmo_core.nn.attention import (
    FlashAttention2Backend,
    FlashAttention3Backend,
    FlashAttention4Backend,
    TEAttentionBackend,
)
from olmo_core.nn.attention.kv_cache import KVCacheManager

CACHE: dict[str, Case] = {
    "no rows": (lambda: layer().init_kv_cache_manager(0, 8), ValueError, r"batch_size.*0"),
    "no length": (lambda: layer().init_kv_cache_manager(1, 0), ValueError, r"max_seq_len.*0"),
    "manager without heads": (
        lambda: KVCacheManager(1, 8, 0, 4, torch.device("cpu"), torch.float32),
        ValueError,
        r"num_kv_heads.*0",
    ),
    "a prefill too long": (lambda: cached(length=4)(x(seq=5)), RuntimeError, r"4.*5|5.*4"),
    "a step too far": (
        lambda: twice(cached(length=T), x(), x(seq=1)),
        RuntimeError,
        r"6",
    ),
    "another batch": (lambda: cached(batch=2)(x(batch=3)), ValueError, r"2.*3|3.*2"),
    "documents": (
        lambda: cached()(x(), cu_doc_lens=cu(0, T)),
        (ValueError, RuntimeError),
        r"cu_doc_lens",
    ),
    "rollback of more than there is": (
        lambda: cached().kv_cache_manager.rollback(1),
        ValueError,
        r"1",
    ),
    "left padding of another batch": (
        lambda: layer()(x(batch=2), cache_leftpad=cu(1)),
        ValueError,
        r"cache_leftpad.*\(1,\)",
    ),
    "left padding in two dimensions": (
        lambda: layer()(x(), cache_leftpad=cu(1)[None]),
        ValueError,
        r"cache_leftpad.*\(1, 1\)",
    ),
    "left padding in floats": (
        lambda: layer()(x(), cache_leftpad=torch.tensor([1.0])),
        TypeError,
        r"cache_leftpad.*float32",
    ),
    "left padding in a list": (
        lambda: layer()(x(), cache_leftpad=[1]),
        TypeError,
        r"cache_leftpad.*list",
    ),
    "negative left padding": (
        lambda: layer()(x(), cache_leftpad=cu(-1)),
        ValueError,
        r"cache_leftpad.*-1",
    ),
    "more left padding than tokens": (
        lambda: layer()(x(), cache_leftpad=cu(T + 1)),
        ValueError,
        r"cache_leftpad.*7",
    ),
    "left padding and documents": (
        lambda: layer()(x(), cache_leftpad=cu(1), cu_doc_lens=cu(0, T)),
        ValueError,
        r"cache_leftpad",
    ),
}

Q = (1, T, H, 4)
BACKEND: dict[str, Case] = {
    "no head_dim": (lambda: backend(head_dim=0), CONFIG, r"head_dim.*0"),
    "no heads": (lambda: backend(n_heads=0), CONFIG, r"n_heads.*0"),
    "kv heads do not divide heads": (lambda: backend(n_kv_heads=3), CONFIG, r"n_kv_heads.*3"),
    "dropout above one": (lambda: backend(dropout_p=1.5), CONFIG, r"dropout_p.*1\.5"),
    "window below -1": (lambda: backend(window_size=(-2, 0)), CONFIG, r"window_size.*-2"),
    "window to the right": (lambda: backend(window_size=(2, 2)), CONFIG, r"window_size.*2"),
    "window of one number": (
        lambda: backend(window_size=4),
        (CONFIG, TypeError),
        r"window_size.*4",
    ),
    "two tensors": (lambda: backend()(qkv(Q, Q, Q)[:2]), VALUE_OR_TYPE, r"2"),
    "three dimensions": (lambda: backend()(qkv(Q[1:], Q[1:], Q[1:])), ValueError, r"\(6, 4, 4\)"),
    "another head_dim": (
        lambda: backend()(qkv((1, T, H, 8), (1, T, H, 8), (1, T, H, 8))),
        ValueError,
        r"8",
    ),
    "another number of heads": (
        lambda: backend()(qkv((1, T, 2, 4), (1, T, 2, 4), (1, T, 2, 4))),
        ValueError,
        r"2",
    ),
    "another number of kv heads": (
        lambda: backend(n_kv_heads=2)(qkv(Q, Q, Q)),
        ValueError,
        r"n_kv_heads|2",
    ),
    "keys unlike values": (lambda: backend()(qkv(Q, Q, (1, 5, H, 4))), ValueError, r"5"),
    "keys of another batch": (
        lambda: backend()(qkv(Q, (2, T, H, 4), (2, T, H, 4))),
        ValueError,
        r"2",
    ),
    "packed in four dimensions": (
        lambda: backend()(torch.ones(1, T, 3 * H, 4)),
        ValueError,
        r"\(1, 6, 12, 4\)",
    ),
    "packed in two": (lambda: backend()(torch.ones(1, T, 2, H, 4)), ValueError, r"2"),
    "packed with kv heads": (
        lambda: backend(n_kv_heads=2)(torch.ones(1, T, 3, H, 4)),
        (ValueError, RuntimeError),
        r"(1, 6, 4, 4)",
    ),
    "two dtypes": (
        lambda: backend()((torch.ones(Q), torch.ones(Q), torch.ones(Q).double())),
        VALUE_OR_TYPE,
        r"float64",
    ),
    "flash_2 without a GPU": (
        lambda: FlashAttention2Backend(head_dim=4, n_heads=H)(qkv(Q, Q, Q)),
        RuntimeError,
        r"(?i)(cuda|gpu|install)",
    ),
    "flash_3 without a GPU": (
        lambda: FlashAttention3Backend(head_dim=4, n_heads=H)(qkv(Q, Q, Q)),
        RuntimeError,
        r"(?i)(cuda|gpu|install)",
    ),
    "flash_4 without a GPU": (
        lambda: FlashAttention4Backend(head_dim=4, n_heads=H)(qkv(Q, Q, Q)),
        RuntimeError,
        r"(?i)(cuda|gpu|install)",
    ),
    "te without a GPU": (
        lambda: TEAttentionBackend(head_dim=4, n_heads=H)(qkv(Q, Q, Q)),
        RuntimeError,
        r"(?i)(cuda|gpu|install)",
    ),
    "context parallelism without a style": (
        lambda: layer().apply_cp(None),
        ValueError,
        r"(?s)ring.*uly",
    ),
    "the backend's, without a style": (
        lambda: backend().apply_cp(None),
        ValueError,
        r"(?s)ring.*uly",
    ),
}

TABLES = {
    "configuration": CONFIGURATION,
    "inputs": INPUTS,
    "lengths": LENGTHS,
    "rope": ROPE,
    "cache": CACHE,
    "backend": BACKEND,
}
CASES = [
    pytest.param(*case, id=f"{table}: {name}")
    for table, cases in TABLES.items()
    for name, case in cases.items()
]


def test_there_are_at_least_sixty() -> None:
    assert len(CASES) >= 60


@pytest.mark.filterwarnings("ignore:use_flash is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_bad_call(
    call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    # One of ours, with a sentence that helps: not an index or a shape from somewhere below.
    assert len(str(caught.value)) > 20


EMPTY = """
import torch
from olmo_core.nn.attention import Attention

for shape in [(0, 6, 16), (1, 0, 16), (0, 0, 16)]:
    for options in [{}, {"window_size": 2}, {"n_kv_heads": 1}, {"dropout": 0.5}]:
        print("last tried:", shape, options, flush=True)
        x = torch.zeros(shape, requires_grad=True)
        try:
            out = Attention(d_model=16, n_heads=4, **options)(x)
        except ValueError as error:
            assert str(shape) in str(error), error
        else:
            assert out.shape == x.shape, out.shape
            out.sum().backward()
print("alive")
"""


def test_empty_inputs_do_not_kill_the_process() -> None:
    """torch's CPU flash op dies with SIGFPE on them: an empty output or an error, nothing else."""
    done = subprocess.run(
        [sys.executable, "-c", EMPTY],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(__file__).parents[3] / "src"), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.stdout.endswith("alive\n"), (done.returncode, done.stdout, done.stderr)
