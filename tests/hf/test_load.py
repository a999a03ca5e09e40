"""Whole models of transformers, loaded here: the same logits, gradients and greedy text; packed
documents as separate ones; written again, transformers' own numbers to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf.models import FAMILIES, VARIANTS, WINDOW, build, qwen3_next, tokens, transformers
from olmo_core.hf import load_config, load_mixer, load_model, save_model
from olmo_core.hf.config import read_config
from olmo_core.hf.layouts import ZeroCentred
from olmo_core.hf.rules import rules_of
from olmo_core.nn.transformer import Transformer, generate

ALL = {**FAMILIES, **VARIANTS}
TOLERANCE = 1e-5


def saved(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def assert_close(got: Tensor, want: Tensor, exact: Tensor) -> None:
    """As near to float64 as theirs is, or within 1e-5; and theirs is near it."""
    size = float(exact.abs().max())
    mine, other = (float((x.detach() - exact).abs().max()) for x in (got, want))
    assert other <= 1e-4 * size
    assert mine <= max(TOLERANCE * size, 2 * other)


def in_float64(path: Path) -> Transformer:
    """The same model, itself held to the float64 reference by other tests."""
    return load_model(path, dtype=torch.float32).double()


@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    theirs = build(ALL[name])
    ours = load_model(saved(theirs, tmp_path))
    exact = in_float64(tmp_path)
    ids = tokens(2, 23)
    want, got = theirs(ids).logits, ours(ids)
    assert_close(got, want, exact(ids).detach())

    cotangent = torch.randn_like(want)
    parameters = dict(theirs.named_parameters())
    grads = torch.autograd.grad(want, list(parameters.values()), cotangent)
    wanted = dict(zip(parameters, grads, strict=True))
    backward(ours, ids, cotangent)
    backward(exact, ids, cotangent.double())
    for key, mine, true in zip(wanted, mapped(ours, theirs), mapped(exact, theirs), strict=True):
        assert mine[0] == key
        assert_close(mine[1], wanted[key], true[1])


def backward(model: nn.Module, ids: Tensor, cotangent: Tensor) -> None:
    model.zero_grad()
    model(ids).backward(cotangent)


def mapped(model: Transformer, theirs: Any) -> list[tuple[str, Tensor]]:
    """Gradients by their names, in their order: layouts are linear up to a constant."""
    imported = read_config(theirs.config.to_dict())
    grads: dict[str, Tensor] = {}
    for rule in rules_of(imported, model):
        ours = [model.get_parameter(n).grad for n in rule.ours]
        if isinstance(rule.layout, ZeroCentred):
            ours = [ours[0] * rule.layout.factor]
            grads[rule.theirs[0]] = ours[0]
        elif len(rule.theirs) == 1:
            grads[rule.theirs[0]] = rule.layout.there(ours)
        else:  # the convolutions, which are one tensor in memory there
            grads[rule.theirs[0].replace("q_conv1d", "conv1d")] = torch.cat(ours)
    return [(name, grads[name]) for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_text(name: str, tmp_path: Path) -> None:
    theirs = build(FAMILIES[name])
    ours = load_model(saved(theirs, tmp_path))
    prompt = tokens(1, 9)
    with torch.no_grad():
        want = theirs.generate(prompt, max_new_tokens=24, do_sample=False)[0, 9:].tolist()
    got = generate(ours, prompt.tolist(), max_new_tokens=24, temperature=0)
    assert [token for (token,) in got] == want


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents(name: str, tmp_path: Path) -> None:
    theirs = build(FAMILIES[name])
    ours = load_model(saved(theirs, tmp_path))
    lengths = [1, 2 * WINDOW, 3, 17]
    ids = tokens(1, sum(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    with torch.no_grad():
        want = torch.cat([theirs(piece).logits for piece in ids.split(lengths, 1)], 1)
        exact = in_float64(tmp_path)(ids, cu_doc_lens=cu)
        assert_close(ours(ids, cu_doc_lens=cu), want, exact)


@pytest.mark.parametrize("name", ALL)
def test_written_again_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    theirs = build(ALL[name])
    ours = load_model(saved(theirs, tmp_path / "in"))
    save_model(ours, tmp_path / "out", max_shard_bytes=40_000)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(back) is type(theirs)
    ids = tokens(2, 23)
    with torch.no_grad():
        got, want = back(ids).logits, theirs(ids).logits
    if "gemma3" in name and "scaling" not in name:
        # Their scale of the scores is in the queries' norm now: one more rounding.
        torch.testing.assert_close(got, want, rtol=TOLERANCE, atol=TOLERANCE)
    else:
        assert torch.equal(got, want)
    again = load_model(tmp_path / "out")
    assert again.config is not None and ours.config is not None
    if "gemma3" not in name:
        assert again.config.as_dict() == ours.config.as_dict()
        for key, value in ours.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_5"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    theirs = build(FAMILIES[name])
    ids = tokens(2, 23)
    with torch.no_grad():
        want = theirs(ids).logits
        theirs = theirs.bfloat16()
        low = theirs(ids).logits.float()
    ours = load_model(saved(theirs, tmp_path))
    assert ours.embeddings.weight.dtype == torch.bfloat16
    with torch.no_grad():
        error = (ours(ids).float() - want).norm()
    assert error <= 2 * (low - want).norm()
    # A norm around zero keeps the bits that it has there.
    norm = ours.lm_head.norm
    assert norm is not None and norm.weight is not None
    assert norm.weight.dtype == (torch.bfloat16 if name == "llama" else torch.float32)
    wide = load_model(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


def test_shards_and_their_index(tmp_path: Path) -> None:
    theirs = build(FAMILIES["qwen3"])
    saved(theirs, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = tokens(1, 9)
    torch.testing.assert_close(
        load_model(tmp_path)(ids), theirs(ids).logits, atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize("layer", [0, 3])
def test_mixers_of_qwen3_next(layer: int, tmp_path: Path) -> None:
    theirs = build(qwen3_next)
    mixer = load_mixer(saved(theirs, tmp_path), layer)
    lengths = [1, 12, 7]
    ids = tokens(1, 20)
    seen: list[tuple[Tensor, Tensor]] = []

    def record(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen.append((kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out))

    block = theirs.model.layers[layer]
    module = block.linear_attn if hasattr(block, "linear_attn") else block.self_attn
    handle = module.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        for piece in ids.split(lengths, 1):
            theirs(piece, use_cache=False)
        handle.remove()
        x, want = (torch.cat(parts, 1) for parts in zip(*seen, strict=True))
        cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        got = mixer(x, cu_doc_lens=cu)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def test_older_files_say_the_same(tmp_path: Path) -> None:
    """``rope_theta`` and ``rope_scaling`` at the top, as transformers 4 wrote them."""
    for name in ("llama, 3.1 scaling", "olmo3", "gemma3, linear scaling", "qwen3_5"):
        theirs = build(ALL[name])
        folder = saved(theirs, tmp_path / name)
        new = load_config(folder)
        values = json.loads((folder / "config.json").read_text())
        ropes = values.pop("rope_parameters")
        full = ropes.get("full_attention", ropes)
        values["rope_theta"] = full.pop("rope_theta")
        if "sliding_attention" in ropes:
            values["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        if name == "qwen3_5":
            values["partial_rotary_factor"] = full.pop("partial_rotary_factor")
        else:
            full["type"] = full.pop("rope_type")
            values["rope_scaling"] = full
        (folder / "config.json").write_text(json.dumps(values))
        assert load_config(folder) == new


def test_a_text_model_inside_a_multimodal_one(tmp_path: Path) -> None:
    theirs = build(FAMILIES["gemma3"])
    saved(theirs, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": values, "vision_config": {"depth": 2}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {k.replace("model.", "model.language_model."): v for k, v in tensors.items()}
    renamed["model.vision_tower.patch.weight"] = torch.zeros(3)
    save_file(renamed, tmp_path / "model.safetensors")
    ids = tokens(1, 9)
    torch.testing.assert_close(
        load_model(tmp_path)(ids), theirs(ids).logits, atol=TOLERANCE, rtol=TOLERANCE
    )
