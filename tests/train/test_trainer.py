"""The loop: what it computes, how it stops, and that resuming changes no bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from olmo_core.data import EOD, DataError
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention import AttentionConfig
from olmo_core.nn.transformer import TransformerBlockConfig, TransformerConfig
from olmo_core.train.checkpoint import CheckpointError, checkpoint_folders, find_checkpoint
from olmo_core.train.config import TrainConfig
from olmo_core.train.folder import RunFolder
from olmo_core.train.metrics import Row, read_metrics
from olmo_core.train.presets import PRESETS, get_preset
from olmo_core.train.trainer import Trainer, TrainingError


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    lines = [json.dumps({"text": f"{i} mice and {i * i} cats. " * (1 + i % 7)}) for i in range(60)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(corpus: Path) -> TrainConfig:
    attention = AttentionConfig(n_heads=2, bias=False, dropout=0.1)
    return TrainConfig(
        model=TransformerConfig(
            d_model=16, vocab_size=257, n_layers=2, init_method="fan_in",
            blocks=[TransformerBlockConfig(sequence_mixer=attention)],
        ),
        steps=12, eval_every=4, eval_batches=2, save_every=3, log_every=2, device="cpu",
    ).merge(["data.batch_size=2", "data.sequence_length=32", f"data.path={corpus}",
             "optimizer.lr=1e-2", "optimizer.warmup_steps=2"])  # fmt: skip


class Watch:
    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.folders: list[str] = []

    def steps(self, rows: list[Row]) -> None:
        self.rows += rows

    def saved(self, folder: Path) -> None:
        self.folders.append(folder.name)


def curve(run: Path) -> list[Row]:
    return [
        {k: v for k, v in r.items() if k != "seconds"} for r in read_metrics(run / "metrics.jsonl")
    ]


def test_a_run(config: TrainConfig, tmp_path: Path) -> None:
    watch, trainer = Watch(), Trainer(config, tmp_path)
    summary = trainer.fit(watch)
    rows = curve(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in watch.rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "held_out" in row] == [4, 8, 12]
    assert watch.folders == [f"step-{i:08d}" for i in (3, 6, 9, 12)]
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["step-00000009", "step-00000012"]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert summary.step == 12 and summary.stopped_by is None
    assert summary.held_out == rows[-1]["held_out"] == trainer.evaluate(8)
    assert summary.bigram == trainer.bigram_bits_per_byte(8)


def test_bits_per_byte_against_one_document_at_a_time(config: TrainConfig, tmp_path: Path) -> None:
    trainer = Trainer(config, tmp_path)
    bits, n_bytes = 0.0, 0
    model = trainer.model.eval()
    for row in trainer.held_out.rows:
        for span in row:
            tokens = trainer.held_out.stream[span.start : span.start + span.length + 1].long()
            with torch.no_grad():
                log_p = model(tokens[None, :-1])[0].double().log_softmax(-1)
            bits -= float(log_p.gather(1, tokens[1:, None]).sum()) / math.log(2)
            n_bytes += int((tokens[1:] != EOD).sum())
    everything = trainer.evaluate(10**6)
    assert everything == pytest.approx(bits / n_bytes, rel=1e-5)
    assert trainer.model.training


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_resuming_changes_no_bit(config: TrainConfig, tmp_path: Path, stop: int) -> None:
    Trainer(config, tmp_path / "whole").fit(Watch())
    expected, weights = curve(tmp_path / "whole"), find_checkpoint(tmp_path / "whole")[0].model()

    run = tmp_path / "broken"
    trainer = Trainer(config, run)

    class Stop(Watch):
        def steps(self, rows: list[Row]) -> None:
            if rows[-1]["step"] >= stop:
                trainer.stop_signal = 15

    summary = trainer.fit(Stop())
    assert summary.stopped_by == 15 and summary.held_out is None
    checkpoint, _ = find_checkpoint(run)
    assert checkpoint.step == summary.step and stop <= summary.step < 12
    torch.manual_seed(99)  # whatever the process drew before
    Trainer(TrainConfig.from_dict(checkpoint.config), run, checkpoint=checkpoint).fit(Watch())
    assert curve(run) == expected
    for name, value in find_checkpoint(run)[0].model().items():
        assert torch.equal(value, weights[name]), name


def test_resuming_from_an_older_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    Trainer(config, tmp_path).fit(Watch())
    expected = curve(tmp_path)
    (tmp_path / "step-00000012" / "model.safetensors").write_bytes(b"")
    checkpoint, problems = find_checkpoint(tmp_path)
    assert checkpoint.step == 9 and len(problems) == 1
    Trainer(config, tmp_path, checkpoint=checkpoint).fit(Watch())
    assert curve(tmp_path) == expected
    assert (tmp_path / "damaged-step-00000012").is_dir()


def test_a_finished_run_can_go_on(config: TrainConfig, tmp_path: Path) -> None:
    Trainer(config, tmp_path).fit(Watch())
    checkpoint, _ = find_checkpoint(tmp_path)
    again = Trainer(config, tmp_path, checkpoint=checkpoint).fit(Watch())
    assert again.step == 12 and again.held_out == curve(tmp_path)[-1]["held_out"]
    longer = Trainer(config.merge(["steps=14"]), tmp_path, checkpoint=checkpoint).fit(Watch())
    assert longer.step == 14 and len(curve(tmp_path)) == 14


def test_normalized_model_stays_normalized(config: TrainConfig, tmp_path: Path) -> None:
    block = TransformerBlockConfig(
        name="ngpt", sequence_mixer=AttentionConfig(name="normalized", n_heads=2)
    )
    config = config.replace(steps=2, model=config.model.replace(blocks=[block]))
    Trainer(config, tmp_path).fit(Watch())
    weights = find_checkpoint(tmp_path)[0].model()
    for name in ("embeddings.weight", "blocks.0.sequence_mixer.w_q.weight"):
        torch.testing.assert_close(weights[name].norm(dim=1), torch.ones(weights[name].shape[0]))


@pytest.mark.parametrize("step", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_named(
    config: TrainConfig, tmp_path: Path, step: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever step it is: with a look at held-out text, a checkpoint, both, none, or the last."""
    config = config.replace(steps=7, save_every=6, log_every=5)
    trainer = Trainer(config, tmp_path)
    take = trainer.optimizer.step

    def spoil() -> None:
        take()
        if trainer.step == step - 1:
            with torch.no_grad():
                trainer.model.embeddings.weight[32] = value

    monkeypatch.setattr(trainer.optimizer, "step", spoil)
    with pytest.raises(
        TrainingError, match=r"diverged\. Start a new run with a lower optimizer.lr"
    ):
        trainer.fit(Watch())
    # Nothing that is not finite has been written.
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for folder in checkpoint_folders(tmp_path):
        assert find_checkpoint(folder)[0].model()["embeddings.weight"].isfinite().all()


def test_infinite_gradients_are_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: torch.tensor(math.inf))
    with pytest.raises(TrainingError, match=r"the gradient of step 1 is inf"):
        Trainer(config, tmp_path).fit(Watch())


def test_lack_of_memory_is_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config, tmp_path)
    monkeypatch.setattr(trainer, "forward", lambda *_, **__: torch.empty(2**60))
    with pytest.raises(TrainingError, match=r"out of memory: .*smaller data.batch_size"):
        trainer.fit(Watch())


def test_lack_of_a_compiler_is_named(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.exc import BackendCompilerFailed

    def fails(*args: object, **kwargs: object) -> None:
        raise BackendCompilerFailed(lambda: None, RuntimeError("no g++"), None)

    trainer = Trainer(config, tmp_path)
    monkeypatch.setattr(trainer, "forward", fails)
    with pytest.raises(TrainingError, match=r"can't be compiled here.*Leave out compile=true"):
        trainer.fit(Watch())


def test_only_one_process_trains_in_a_folder(config: TrainConfig, tmp_path: Path) -> None:
    other = Trainer(config, tmp_path)

    class Second(Watch):
        def saved(self, folder: Path) -> None:
            with pytest.raises(TrainingError, match="another process is training"):
                other.fit(Watch())

    Trainer(config.replace(steps=1), tmp_path).fit(Second())


def test_a_folder_is_tried_before_data_and_model(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(trainer: Trainer) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(Trainer, "_load_data", touched)
    monkeypatch.setattr(Trainer, "_init_weights", touched)
    (tmp_path / "file").touch()
    with pytest.raises(OLMoConfigurationError, match=r"can't be made: Not a directory"):
        Trainer(config, tmp_path / "file" / "run")
    with RunFolder(tmp_path / "r").held(), pytest.raises(TrainingError, match="another process"):
        Trainer(config, tmp_path / "r")


def test_data_that_changed_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    Trainer(config.replace(steps=1), tmp_path).fit(Watch())
    checkpoint, _ = find_checkpoint(tmp_path)
    (tmp_path / "other.txt").write_text("other text " * 99)
    other = config.merge([f"data.path={tmp_path / 'other.txt'}"])
    with pytest.raises(CheckpointError, match="trained on other text"):
        Trainer(other, tmp_path, checkpoint=checkpoint)


def test_held_out_text_that_changed_is_refused(
    config: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    from olmo_core.data import load_documents, split_documents

    train, held_out = split_documents(load_documents(corpus))
    path, run = tmp_path / "text.jsonl", tmp_path / "run"
    config = config.merge([f"data.path={path}", "steps=1"])

    def write(documents: list[bytes]) -> None:
        path.write_text("\n".join(json.dumps({"text": d.decode()}) for d in documents))

    write(train + held_out)
    Trainer(config, run).fit(Watch())
    checkpoint, _ = find_checkpoint(run)
    # One held-out document is another one that is held out, too.
    first, *others = held_out
    changed = ([*train, first[:-3] + bytes(f"{i:03}", "ascii"), *others] for i in range(999))
    write(next(d for d in changed if split_documents(d)[0] == train and d != train + held_out))
    with pytest.raises(CheckpointError, match=r"other text .*\(the held-out text changed\)"):
        Trainer(config, run, checkpoint=checkpoint)
    write(train + held_out)
    Trainer(config, run, checkpoint=checkpoint)


def test_another_model_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    Trainer(config.replace(steps=1), tmp_path).fit(Watch())
    checkpoint, _ = find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        Trainer(config.merge(["model.d_model=32"]), tmp_path, checkpoint=checkpoint)


@pytest.mark.parametrize(
    "change",
    [
        "steps=0", "eval_every=0", "eval_batches=-1", "save_every=0", "log_every=0", "seed=-1",
        "data.batch_size=0", "data.sequence_length=0", "data.max_doc_len=0", "data.max_doc_len=33",
        "data.held_out=0", "data.held_out=1.5", "optimizer.lr=0", "optimizer.lr=nan",
        "optimizer.betas=[0.9,1]", "optimizer.eps=-1", "optimizer.weight_decay=-0.1",
        "optimizer.warmup_steps=-1", "optimizer.grad_clip=0", "model.n_layers=0",
        "model.pattern=[3]", "device=abacus", "device=cuda:99", "stepz=3", "optimizer.lr=fast",
        "model.blocks.0.sequence_mixer.n_heads=3", "device=meta", "device=cpu:3",
        "autocast=float32",
        "model.vocab_size=256", "model.init_std=0", "model.init_std=inf", "data.path=",
        "optimizer.grad_clip=inf", "optimizer.weight_decay=nan", "steps=" + "9" * 30,
        "model.d_model=1000000002", "model.n_layers=1000000000000", "data.batch_size=1000000000000",
        "data.sequence_length=1000000000000",
    ],
)  # fmt: skip
def test_bad_values(config: TrainConfig, tmp_path: Path, change: str) -> None:
    key = change.partition("=")[0].rpartition(".")[2]
    with pytest.raises(OLMoConfigurationError, match=key if key != "n_heads" else "16"):
        Trainer(config.merge([change]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_data(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Trainer(config.merge(["data.path=/nowhere.txt"]), tmp_path)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    config = get_preset(name)
    config.check()
    assert TrainConfig.from_dict(config.as_config_dict()) == config
    model = config.model.build(init_device="meta")
    assert model.num_params() == config.model.num_params()
    assert 0.5e6 < model.num_params() < 2e6


def test_unknown_preset() -> None:
    with pytest.raises(OLMoConfigurationError, match=r"'tinny'; did you mean 'tiny'"):
        get_preset("tinny")
