"""Draws a case from a seed: which layers, on which tokens, called how.

A case is plain data: it prints as what it is, and the oracle reads it without the library. Options
that are left out have the interface's defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

__all__ = ["Case", "draw", "simpler"]


@dataclass(frozen=True)
class Case:
    """Layers one after the other, and how they are called."""

    seed: int
    """Of the case, and of its weights and tokens."""
    layers: tuple[dict[str, Any], ...]
    """The arguments of each layer's constructor, and ``mixer``, its class."""
    d_model: int
    batch: int
    seq_len: int
    dtype: str = "float64"
    """Of weights and tokens."""
    autocast: bool = False
    """Under autocast to bfloat16."""
    via_config: bool = False
    """Built by a config, not by the constructor."""
    compiler: str | None = None
    """The backend of ``torch.compile``."""
    checkpoint: bool = False
    """Recomputed in backward."""
    inference: bool = False
    """Without gradients."""
    frozen: bool = False
    """Every other parameter, and the tokens, want no gradient."""
    extreme: bool = False
    """Tokens are nearly equal, and recurrent states decay fast."""
    strided: bool = False
    """Tokens and lengths are views of larger tensors."""
    sum_loss: bool = False
    """The loss is the sum of the output, whose gradient has strides of 0."""
    refilled: bool = False
    """The lengths' tensor held others in a call before, and no version counter tells."""

    documents: tuple[int, ...] | None = None
    """The length of each document, over the flattened batch."""
    max_doc_len: int | None = None
    leftpad: tuple[int, ...] | None = None
    """Padding at the start of each row."""
    buffers_from: int | None = None
    """RoPE buffers are given, of positions from this one on."""

    script: tuple[int, ...] = ()
    """With a cache: tokens that come in a call, or minus those that are forgotten."""
    max_rollback: int = 0
    before: tuple[str, int] | None = None
    """The cache was given another prompt of so many tokens before, which was forgotten by ``reset``
    or ``rollback``, or ``refused`` for its length."""

    def __str__(self) -> str:
        """The fields that are not at their defaults."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        given = {f.name: given[f.name] for f in dataclasses.fields(self)
                 if given[f.name] != f.default}  # fmt: skip
        return f"Case({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def draw(seed: int, compiler: str | None = None) -> Case:
    """The case of a seed.

    :param compiler: The backend of ``torch.compile``, or None for eager mode.
    """
    r = Random(seed)
    d_model = r.choice((8, 12, 16, 24))
    depth = r.choice((1, 1, 1, 1, 2) if compiler else (1, 1, 1, 1, 2, 3))  # compiling takes long
    layers = tuple(_layer(r, d_model) for _ in range(depth))
    case = Case(seed, layers, d_model, r.randint(1, 3), _length(r), compiler=compiler)
    dtype = r.choice(("float64", "float64", "float64", "float32", "float32", "bfloat16", "float16"))
    autocast = dtype in ("float32", "bfloat16") and r.random() < 0.4
    case = dataclasses.replace(
        case,
        dtype=dtype,
        autocast=autocast,
        # A config has no softmax_scale.
        via_config=r.random() < 0.3 and not any("softmax_scale" in s for s in layers),
        strided=r.random() < 0.3,
        # In half precision nothing would be left but rounding.
        extreme=dtype in ("float64", "float32") and not autocast and r.random() < 0.2,
    )
    if r.random() < (0.15 if compiler else 0.35):
        return _with_cache(r, case)
    case = dataclasses.replace(
        case,
        # The gradients of deep float16 stacks overflow.
        inference=r.random() < 0.2 or (dtype == "float16" and len(layers) > 1),
        checkpoint=r.random() < 0.2,
        frozen=r.random() < 0.2,
        sum_loss=r.random() < 0.2,
        refilled=r.random() < 0.3,
    )
    return _with_lengths(r, case)


def _layer(r: Random, d_model: int) -> dict[str, Any]:
    mixer = r.choice(("Attention", "Attention", "GatedDeltaNet", "GatedDeltaNet",
                      "NormalizedAttention", "FusedAttention"))  # fmt: skip
    heads = [n for n in (1, 2, 3, 4, 6) if d_model % n == 0]
    spec: dict[str, Any] = {"mixer": mixer, "n_heads": r.choice(heads)}
    if mixer == "GatedDeltaNet":
        return spec | _gated_delta_net(r, spec["n_heads"])
    if mixer == "Attention" and r.random() < 0.5:
        spec |= {"n_heads": r.randint(1, 6), "head_dim": r.choice((1, 2, 4, 5, 6, 8, 12, 40))}
        if d_model % spec["n_heads"] == 0 and r.random() < 0.3:
            del spec["head_dim"]
    head_dim = spec.get("head_dim", d_model // spec["n_heads"])
    maybe = {
        "n_kv_heads": r.choice([n for n in range(1, 7) if spec["n_heads"] % n == 0]),
        "bias": r.random() < 0.5,
        "gate": _gate(r),
        "rope": _rope(r, head_dim, fused=mixer == "FusedAttention"),
        "clip_qkv": r.choice((0.1, 1.0, 3.0)),
        "qk_norm": _norm(r),
        "softmax_scale": r.choice((0.05, 0.5, 3.0)),
        "window_size": r.choice((1, 2, 3, r.randint(4, 20), r.randint(4, 80))),
        "dropout": 0.5,
        "backend": "torch",
    }
    lacks = {
        "Attention": (),
        "NormalizedAttention": ("bias", "gate", "clip_qkv", "softmax_scale", "dropout"),
        "FusedAttention": ("n_kv_heads", "gate", "qk_norm", "softmax_scale"),
    }[mixer]
    # A head of one dimension has nothing to rotate.
    maybe = {k: v for k, v in maybe.items() if k not in lacks and v is not None}
    rare = {"clip_qkv": 0.2, "softmax_scale": 0.2, "rope": 0.7, "dropout": 0.2, "backend": 0.2}
    spec |= {name: value for name, value in maybe.items() if r.random() < rare.get(name, 0.5)}
    if "qk_norm" in spec and mixer == "Attention" and r.random() < 0.5:
        spec["use_head_qk_norm"] = True
    return spec


def _gated_delta_net(r: Random, n_heads: int) -> dict[str, Any]:
    maybe = {
        "n_v_heads": n_heads * r.randint(1, 3),
        "head_dim": r.choice((2, 4, 6, 8, 16)),
        "expand_v": r.choice((0.5, 1.0, 1.5, 2.0)),
        "allow_neg_eigval": r.random() < 0.5,
        "conv_size": r.randint(1, 6),
        "conv_bias": r.random() < 0.5,
        "norm_eps": r.choice((1e-6, 1e-2)),
    }
    spec = {name: value for name, value in maybe.items() if r.random() < 0.6}
    if "head_dim" not in spec:
        spec.pop("expand_v", None)  # the width of a head may be odd
    return spec


def _gate(r: Random) -> dict[str, Any]:
    granularity = r.choice(("headwise", "elementwise"))
    return {"granularity": granularity, "full_precision": r.random() < 0.5}


def _norm(r: Random) -> dict[str, Any]:
    kinds = ("default", "rms", "fused_rms", "qwen_rms", "cute_rms", "l2_norm")
    spec: dict[str, Any] = {"name": r.choice(kinds), "full_precision": r.random() < 0.7}
    if spec["name"] != "l2_norm":
        spec |= {"eps": r.choice((1e-6, 1e-5, 1e-2)), "elementwise_affine": r.random() < 0.8}
        spec["bias"] = spec["elementwise_affine"] and r.random() < 0.5
    return spec


def _rope(r: Random, head_dim: int, *, fused: bool) -> dict[str, Any] | None:
    parts = [f for f in (0.25, 0.5, 0.75, 1.0, 1.0) if head_dim * f in range(2, head_dim + 1, 2)]
    if not parts:
        return None
    scalings: dict[str, dict[str, Any]] = {
        "none": {},
        "abf": {"new_theta": r.choice((5e3, 8e6)), "attention_rescale_factor": 1.2},
        "pi": {"factor": r.choice((2.0, 5.0)), "attention_rescale_factor": 0.9},
        "stepwise": {
            "factor": r.choice((4.0, 32.0)),
            "old_context_len": r.choice((32, 256, 8192)),
            "low_freq_proportion": r.choice((0.0, 0.25)),
            "high_freq_proportion": r.choice((0.1, 0.25)),
        },
        "yarn": {
            "factor": r.choice((2.0, 8.0)),
            "old_context_len": r.choice((64, 512, 8192)),
            "beta_fast": r.choice((8, 32)),
        },
    }
    kind = r.choice(("none", *scalings))
    return {
        "name": "fused" if fused else r.choice(("default", "complex", "fused")),
        "theta": r.choice((100.0, 10_000.0, 500_000.0)),
        "full_precision": r.random() < 0.7,
        "no_global_rope": r.random() < 0.15,
        "partial_rotary_factor": r.choice(parts),
    } | ({} if kind == "none" else {"scaling": {"type": kind} | scalings[kind]})


def _length(r: Random) -> int:
    """Around the sizes of blocks and chunks, too."""
    usual = r.choice((1, 2, 3, r.randint(4, 24), r.randint(4, 24), r.randint(31, 33),
                      r.randint(34, 70)))  # fmt: skip
    return usual if r.random() < 0.97 else r.randint(120, 300)


def _with_lengths(r: Random, case: Case) -> Case:
    """Rows as they are, padded on the left, or documents; and RoPE buffers."""
    kind = r.choice(("rows", "leftpad", "documents", "documents", "documents"))
    buffers_from = r.choice((None, None, 0, 3))
    if kind == "leftpad":
        leftpad = tuple(r.choice((0, r.randint(0, case.seq_len))) for _ in range(case.batch))
        return dataclasses.replace(case, leftpad=leftpad)
    if kind == "rows":
        return dataclasses.replace(case, buffers_from=buffers_from)
    if buffers_from is None:
        documents = _documents(r, case.batch * case.seq_len)
    else:  # are rows of a table, so no document crosses a row
        documents = tuple(n for _ in range(case.batch) for n in _documents(r, case.seq_len))
    longest, total = max(documents), case.batch * case.seq_len
    max_doc_len = r.choice((None, longest, longest + 3, total, 10 * total))
    return dataclasses.replace(
        case, documents=documents, max_doc_len=max_doc_len, buffers_from=buffers_from
    )


def _documents(r: Random, total: int) -> tuple[int, ...]:
    """Lengths that add up to ``total``; some are 0."""
    cuts = r.choice((0, 1, 3, total // 3, total))
    ends = sorted(r.choice((r.randint(0, total), 0, total)) for _ in range(cuts))
    if r.random() < 0.15:
        ends = list(range(total))  # one token each
    return tuple(b - a for a, b in zip((0, *ends), (*ends, total)))


def _with_cache(r: Random, case: Case) -> Case:
    """A prompt and more, in chunks of any size, of which the last may be forgotten again."""
    max_rollback = r.choice((0, 0, 1, 3, 8))
    forgets_all = all(s["mixer"] != "GatedDeltaNet" and "window_size" not in s for s in case.layers)
    script: list[int] = []
    fed = restorable = 0
    for _ in range(r.randint(1, 8)):
        # Each length is a graph of its own.
        n = r.choice((1, 1, 9) if case.compiler else (1, 1, 1, r.randint(1, 6), _length(r)))
        fed, restorable = fed + n, min(max_rollback, restorable + n)
        script.append(n)
        most = fed if forgets_all else restorable
        if most and r.random() < 0.4:
            n = r.randint(1, most)
            fed, restorable = fed - n, max(0, restorable - n)
            script.append(-n)
    before = None
    if r.random() < 0.4:
        most = 12 if forgets_all else max_rollback
        how = r.choice(("reset", "refused", "rollback" if most else "reset"))
        before = (how, r.randint(1, most) if how == "rollback" else 9)
    leftpad = tuple(r.choice((0, r.randint(0, max(script)))) for _ in range(case.batch))
    return dataclasses.replace(
        case,
        script=tuple(script),
        max_rollback=max_rollback,
        leftpad=leftpad if r.random() < 0.5 else None,
        before=before,
    )


def simpler(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one respect; some do not exist, and are refused."""
    for layer in case.layers if len(case.layers) > 1 else ():
        yield dataclasses.replace(case, layers=(layer,))
    for field in dataclasses.fields(case):
        default = field.default
        if default is not dataclasses.MISSING and getattr(case, field.name) != default:
            yield dataclasses.replace(case, **{field.name: default})
    for i, layer in enumerate(case.layers):
        for option in layer.keys() - {"mixer", "n_heads"}:
            less = {name: value for name, value in layer.items() if name != option}
            yield dataclasses.replace(case, layers=(*case.layers[:i], less, *case.layers[i + 1 :]))
    for i in range(len(case.script)):
        yield dataclasses.replace(case, script=case.script[:i] + case.script[i + 1 :])
    if case.documents is None and case.leftpad is None:
        for name in ("batch", "seq_len"):
            if getattr(case, name) > 1:
                yield dataclasses.replace(case, **{name: getattr(case, name) // 2})
