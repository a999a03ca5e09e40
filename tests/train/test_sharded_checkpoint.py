"""What some ranks have written, any other number of them reads, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from gloo_ranks import on_ranks
from nn.attention.parallel.sharing import Block, make, mesh_of, whole
from olmo_core.cli.main import app
from olmo_core.train.checkpoint import find_checkpoint, save_checkpoint
from olmo_core.train.sharded_checkpoint import find_checkpoint_together, save_sharded

pytestmark = pytest.mark.distributed

# Norms over the full width and per head, with and without biases, packed rows, convolutions.
NAMES = ["full norm, clip", "head norm, headwise gate, window", "norm with bias", "ngpt"]
NAMES += ["fused", "gva", "swiglu"]
EXPECTED = "expected.safetensors"
PATIENCE = 200  # ranks that start import FSDP and DCP
SMALL = [
    "--preset=tiny", "model.d_model=16", "model.n_layers=2", "data.batch_size=2",
    "model.blocks.0.sequence_mixer.n_heads=2", "data.sequence_length=32", "data.max_doc_len=null",
    "device=cpu", "eval_batches=1", "--sample=0",
]  # fmt: skip


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(make(name)) for name in NAMES)
        self.one = nn.Parameter(torch.tensor([2.5]))  # most ranks have nothing of it


def build(tp: int, dp: int) -> Layers:
    """All mixers, on this many ranks."""
    from torch.distributed.fsdp import fully_shard

    module = Layers()
    mesh = mesh_of(dp, tp, names=("dp", "tp"))
    if tp > 1:
        for block in module.blocks:
            block.mixer.apply_tp(mesh["tp"])
    for block in module.blocks:
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(module, mesh=mesh["dp"])
    return module


def adamw(module: nn.Module) -> torch.optim.AdamW:
    """With a state, from two steps whose gradients are the values themselves."""
    meshes: dict[Any, list[nn.Parameter]] = {}
    for p in module.parameters():
        meshes.setdefault(getattr(p, "device_mesh", None), []).append(p)
    optimizer = torch.optim.AdamW([{"params": group} for group in meshes.values()], fused=True)
    for _ in range(2):
        for p in module.parameters():
            p.grad = p.detach().clone()
        optimizer.step()
    return optimizer


def contents(module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], ...]:
    training = {"rng.cpu": torch.get_rng_state()}
    for name, parameter in module.named_parameters():
        for field, value in optimizer.state[parameter].items():
            training[f"optimizer.{field}.{name}"] = value
    return module.state_dict(), training


def saved(rank: int, n: int, run: Path, tp: int) -> None:
    module = build(tp, n // tp)
    torch.manual_seed(7)
    model, training = contents(module, adamw(module))
    folder = save_sharded(run, 3, model=model, training=training, config={"a": 1}, extra={"b": "c"})
    assert folder == run / "step-00000003"
    expected = {name: whole(tensor).contiguous() for name, tensor in (model | training).items()}
    if rank == 0:
        save_file(expected, run / EXPECTED)


def loaded(rank: int, n: int, run: Path, tp: int) -> None:
    module = build(tp, n // tp)
    model, training = contents(module, adamw(module))
    with torch.no_grad():
        for tensor in (model | training).values():
            tensor.fill_(1)
    checkpoint, problems = find_checkpoint_together(run)
    assert checkpoint == find_checkpoint(run)[0] and problems == []
    checkpoint.load_into(model, training)
    same(model | training, load_file(run / EXPECTED))


def same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        value = whole(tensor)
        assert value.dtype == want[name].dtype and torch.equal(value, want[name]), name


def check_alone(run: Path) -> None:
    """One process, without a process group."""
    want = load_file(run / EXPECTED)
    checkpoint, problems = find_checkpoint(run)
    assert (checkpoint.step, checkpoint.config, checkpoint.extra) == (3, {"a": 1}, {"b": "c"})
    assert problems == []
    same(checkpoint.model() | checkpoint.training(), want)
    model, training = (
        {name: torch.full_like(x, 1) for name, x in part.items()}
        for part in (checkpoint.model(), checkpoint.training())
    )
    checkpoint.load_into(model, training)
    same(model | training, want)


def test_two_by_two_ranks_to_one_and_three(tmp_path: Path) -> None:
    on_ranks(4, saved, tmp_path, 2, timeout=PATIENCE)
    files = [path for path in (tmp_path / "step-00000003").rglob("*") if path.is_file()]
    assert len(files) == 9
    assert {path.suffix for path in files} == {".safetensors", ".json"}  # nothing is pickled
    check_alone(tmp_path)
    on_ranks(1, loaded, tmp_path, 1, timeout=PATIENCE)
    on_ranks(3, loaded, tmp_path, 1, timeout=PATIENCE)
    on_ranks(4, loaded, tmp_path, 2, timeout=PATIENCE)


def test_three_ranks_to_two_by_two(tmp_path: Path) -> None:
    on_ranks(3, saved, tmp_path, 1, timeout=PATIENCE)
    check_alone(tmp_path)
    on_ranks(4, loaded, tmp_path, 2, timeout=PATIENCE)
    on_ranks(2, loaded, tmp_path, 2, timeout=PATIENCE)


def test_one_process_to_two_ranks(tmp_path: Path) -> None:
    module = Layers()
    model, training = contents(module, adamw(module))
    save_checkpoint(tmp_path, 3, model=model, training=training, config={})
    save_file({k: v.clone() for k, v in (model | training).items()}, tmp_path / EXPECTED)
    on_ranks(2, loaded, tmp_path, 1, timeout=PATIENCE)
    on_ranks(4, loaded, tmp_path, 2, timeout=PATIENCE)


def strided(rank: int, n: int, run: Path) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    table = torch.arange(20.0).view(4, 5).t()
    model = {"dealt": distribute_tensor(table, mesh_of(n), [Shard(0)]), "plain": table}
    save_sharded(run, 1, model=model, training={"rng.cpu": torch.arange(4)}, config={})


def test_tensors_may_lie_in_any_order(tmp_path: Path) -> None:
    on_ranks(2, strided, tmp_path)
    table = torch.arange(20.0).view(4, 5).t()
    same(find_checkpoint(tmp_path)[0].model(), {"dealt": table, "plain": table})


def to_shards(rank: int, n: int, run: Path) -> None:
    """Replace the newest checkpoint of one process by one of these ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor

    checkpoint = find_checkpoint_together(run)[0]
    model, training = (
        {
            name: distribute_tensor(torch.ones_like(x), mesh_of(n), [Shard(0)]) if x.dim() else x
            for name, x in part.items()
            if not name.startswith("rng")
        }
        for part in (checkpoint.model(), checkpoint.training())
    )
    training["rng.cpu"] = torch.zeros_like(torch.get_rng_state())
    checkpoint.load_into(model, training)
    save_sharded(
        run, checkpoint.step, model=model, training=training,
        config=checkpoint.config, extra=checkpoint.extra,
    )  # fmt: skip


def test_one_process_goes_on_from_what_ranks_have_written(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} mice and {i * i} cats." for i in range(200)))
    runs = [tmp_path / name for name in ("unbroken", "resumed")]

    def train(run: Path, *more: Any) -> None:
        args = ["train", "--run", run, "--data", text, *more, *SMALL]
        done = CliRunner().invoke(app, [str(arg) for arg in args])
        assert done.exit_code == 0, done.output

    train(runs[0], "--steps", 4)
    train(runs[1], "--steps", 2)
    on_ranks(2, to_shards, runs[1])
    assert sorted(p.name for p in (runs[1] / "step-00000002").iterdir()) == [
        "model",
        "state.json",
        "training",
    ]
    train(runs[1], "--steps", 4, "--resume")
    one, other = (find_checkpoint(run)[0] for run in runs)
    assert one.step == other.step == 4
    same(other.model() | other.training(), one.model() | one.training())
    generate = ["generate", "-n", "5", "-t", "0", "-c"]
    one, other = (CliRunner().invoke(app, [*generate, str(run)]) for run in runs)
    assert one.output == other.output and one.exit_code == 0
