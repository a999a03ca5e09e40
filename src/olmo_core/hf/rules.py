"""Which tensors there are which tensors here: one list, used in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from olmo_core.hf.config import Imported, PretrainedError
from olmo_core.hf.families import (
    ATTENTION,
    FEED_FORWARD,
    MODEL,
    NORMS,
    TEXT_PREFIXES,
    Family,
    Parts,
)
from olmo_core.hf.layouts import SAME, Layout, Rows, ZeroCentred
from olmo_core.nn.attention import AttentionConfig, GatedDeltaNetConfig
from olmo_core.nn.attention.gated_delta_net.sizes import GatedDeltaNetSizes
from olmo_core.nn.transformer import TransformerBlockConfig

MOST_LISTED = 12
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Rule:
    """What one tensor there, or several stacked by rows, hold of ours."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    layout: Layout = SAME


def rules_of(imported: Imported, model: nn.Module) -> list[Rule]:
    """The rules of a whole model.

    :param model: built from ``imported.config``, on ``meta`` for example: it says which biases
        there are.
    """
    names = list(model.state_dict())
    rules = list(_named(MODEL, names, "", "", _norms(imported)))
    for i, block in enumerate(imported.config.layer_blocks()):
        rules += _layer_rules(imported, block, names, f"model.layers.{i}.", f"blocks.{i}.")
    return rules


def mixer_rules(imported: Imported, layer: int, mixer: nn.Module) -> list[Rule]:
    """The rules of one layer's mixer, whose own state dict names are ours."""
    names = [f"sequence_mixer.{name}" for name in mixer.state_dict()]
    block = imported.config.layer_blocks()[layer]
    rules = _layer_rules(imported, block, names, f"model.layers.{layer}.", "")
    return [
        Rule(r.theirs, tuple(name.removeprefix("sequence_mixer.") for name in r.ours), r.layout)
        for r in rules
    ]


def _layer_rules(
    imported: Imported, block: TransformerBlockConfig, names: list[str], theirs: str, ours: str
) -> list[Rule]:
    mixer, norms = block.sequence_mixer, _norms(imported)
    rules = list(_named(FEED_FORWARD, names, theirs, ours))
    rules += _named(NORMS[block.name], names, theirs, ours, norms)
    if isinstance(mixer, GatedDeltaNetConfig):
        assert imported.family.linear is not None
        sizes = _delta_net_rows(mixer, imported.config.d_model)
        theirs, ours = f"{theirs}linear_attn.", f"{ours}sequence_mixer."
        return rules + list(_packed(imported.family.linear, sizes, names, theirs, ours))
    assert isinstance(mixer, AttentionConfig)
    for rule in _named(ATTENTION, names, theirs, ours):
        layout: Layout = rule.layout
        (name,) = rule.theirs
        if ".q_norm." in name and imported.family.zero_centred:
            layout = ZeroCentred(imported.score_scale)
        elif ".k_norm." in name:
            layout = norms(name)
        gated = mixer.gate is not None and ".q_proj." in name
        if gated:
            # Each head's rows: its queries, then its gates.
            size = mixer.head_dim or imported.config.d_model // mixer.n_heads
            gates = tuple(ours.replace("w_q", "w_g") for ours in rule.ours)
            rules.append(Rule(rule.theirs, rule.ours + gates, Rows((size, size), mixer.n_heads)))
        else:
            rules.append(Rule(rule.theirs, rule.ours, layout))
    return rules


def _norms(imported: Imported) -> Callable[[str], Layout]:
    def layout(name: str) -> Layout:
        is_norm = "norm" in name
        return ZeroCentred() if is_norm and imported.family.zero_centred else SAME

    return layout


def _named(
    table: Mapping[str, str],
    names: Iterable[str],
    theirs: str,
    ours: str,
    layout: Callable[[str], Layout] = lambda name: SAME,
) -> Iterator[Rule]:
    """A rule for each parameter of the modules of a table that the model has."""
    for their_module, our_module in table.items():
        for name in names:
            if name.startswith(f"{ours}{our_module}."):
                their_name = theirs + their_module + name.removeprefix(ours + our_module)
                yield Rule((their_name,), (name,), layout(their_name))


def _packed(
    table: Parts, rows: Mapping[str, tuple[int, int]], names: list[str], theirs: str, ours: str
) -> Iterator[Rule]:
    """Rules for tensors that hold several of ours. ``rows``: key heads, and rows for each."""
    for key, modules in table.items():
        their_modules = (key,) if isinstance(key, str) else key
        suffix = "" if f"{ours}{modules[0]}" in names else ".weight"
        full = tuple(f"{ours}{module}{suffix}" for module in modules)
        layout: Layout = SAME
        if len(modules) > 1:
            heads = {rows[module][0] for module in modules}
            by_key_head = key in ("in_proj_qkvz", "in_proj_ba")
            groups = heads.pop() if by_key_head else 1
            layout = Rows(
                tuple(rows[m][1] * (1 if by_key_head else rows[m][0]) for m in modules), groups
            )
        yield Rule(tuple(f"{theirs}{m}{suffix}" for m in their_modules), full, layout)


def _delta_net_rows(mixer: GatedDeltaNetConfig, d_model: int) -> dict[str, tuple[int, int]]:
    """Key heads, and how many rows of each matrix belong to one of them."""
    sizes = GatedDeltaNetSizes.of(
        d_model, mixer.n_heads, mixer.n_v_heads, mixer.head_dim, mixer.expand_v
    )
    group = sizes.n_v_heads // mixer.n_heads
    key, value = sizes.head_k_dim, sizes.head_v_dim * group
    rows = {"w_q": key, "w_k": key, "w_v": value, "w_g": value, "w_a": group, "w_b": group}
    rows |= {"q_conv1d": key, "k_conv1d": key, "v_conv1d": value}
    return {name: (mixer.n_heads, n) for name, n in rows.items()}


def text_names(names: Iterable[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """The tensors of a file by the names that the rules have for them."""
    renamed = {}
    for name in names:
        short = name
        for prefix, without in TEXT_PREFIXES.items():
            if name.startswith(prefix):
                short = without + name.removeprefix(prefix)
                break
        short = ".".join(aliases.get(part, part) for part in short.split("."))
        renamed[short] = name
    return renamed


def import_tensors(
    rules: list[Rule],
    wanted: Mapping[str, Tensor],
    names: Iterable[str],
    read: Callable[[str], Tensor],
    *,
    family: Family,
    tied: bool = False,
) -> dict[str, Tensor]:
    """Our state dict from their tensors.

    :param wanted: our tensors by name, for their shapes and dtypes: on ``meta`` for example.
    :param names: of their tensors.
    :param read: gives one of them.
    :param tied: whether ``lm_head.weight`` may be there as a copy of the embeddings.
    :raises PretrainedError: with a line for each tensor that is missing, unknown or unlike.
    """
    short = text_names(names, family.aliases)
    left = {name for name in short if not any(fnmatch(name, p) for p in family.ignored_tensors)}
    # transformers 4 saved what it computes at each start.
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}
    problems, state = [], {}
    for rule in rules:
        label = ", ".join(rule.theirs)
        left -= set(rule.theirs)
        missing = [name for name in rule.theirs if name not in short]
        if missing:
            problems += [f"{name} is missing" for name in missing]
            continue
        tensors = [read(short[name]) for name in rule.theirs]
        if any(x.dtype not in _FLOATS for x in tensors):
            problems.append(f"{label} is {tensors[0].dtype}: quantised weights are read from GGUF")
            continue
        x = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        try:
            parts = rule.layout.here(x)
        except (ValueError, RuntimeError) as error:
            problems.append(f"{label} of shape {tuple(x.shape)}: {error}")
            continue
        for name, part in zip(rule.ours, parts, strict=True):
            if part.shape != wanted[name].shape:
                problems.append(
                    f"{label} gives {name} the shape {tuple(part.shape)}, the configuration says "
                    f"{tuple(wanted[name].shape)}"
                )
            state[name] = part.to(wanted[name].dtype).contiguous()
    if tied and "lm_head.weight" in left:
        left.discard("lm_head.weight")
        if not torch.equal(read(short["lm_head.weight"]), read(short["model.embed_tokens.weight"])):
            problems.append("lm_head.weight differs from the embeddings that it is tied to")
    problems += [f"{name} is unknown to this model" for name in sorted(left)]
    forgotten = wanted.keys() - {name for rule in rules for name in rule.ours}
    assert not forgotten, f"no rule for {sorted(forgotten)}"
    if problems:
        raise PretrainedError("the weights do not fit their configuration:" + listed(problems))
    return state


def export_tensors(rules: list[Rule], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Their tensors from our state dict."""
    tensors: dict[str, Tensor] = {}
    for rule in rules:
        ours = [state[name] for name in rule.ours]
        parts = [rule.layout.there(ours)] if len(rule.theirs) == 1 else ours
        tensors |= {name: x.contiguous() for name, x in zip(rule.theirs, parts, strict=True)}
    return tensors


def listed(problems: list[str]) -> str:
    """Problems as lines, the first few of many."""
    lines = "".join(f"\n- {problem}" for problem in problems[:MOST_LISTED])
    more = len(problems) - MOST_LISTED
    return lines + (f"\n- and {more} more" if more > 0 else "")
