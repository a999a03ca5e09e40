"""``olmo-core generate``."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olmo_core.cli.streams import read_stdin
from olmo_core.cli.tables import path_of
from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    import torch

    from olmo_core.nn.transformer import Transformer


def command(
    checkpoint: Annotated[
        Path,
        typer.Option(
            "--checkpoint",
            "-c",
            metavar="FOLDER",
            parser=path_of("--checkpoint"),
            help="A run's folder, or one step-* folder in it.",
        ),
    ],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PROMPT]...",
            help="Text to continue; several are continued together; '-' reads standard input.",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Most tokens (bytes) of each continuation.")
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
    from olmo_core.data import EOD, decode, encode
    from olmo_core.nn.transformer import generate
    from olmo_core.nn.transformer.generation import check_request
    from olmo_core.utils import checked_device

    texts = _texts(prompts)
    encoded = [encode(text) for text in texts]
    where = checked_device(device)
    try:
        check_request(encoded, max_tokens, temperature, top_p, seed)
    except ValueError as error:
        raise OLMoConfigurationError(str(error)) from error
    longest = max(map(len, encoded)) + max_tokens
    model, trained = _load(checkpoint, where, (len(texts), longest) if cache else None)
    if longest > trained:
        print(
            f"The model was trained on documents of at most {trained} tokens, this text may reach "
            f"{longest}: expect it to get worse.",
            file=sys.stderr,
        )
    steps = generate(
        model,
        encoded,
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        end_token=EOD,
        use_cache=cache,
    )

    if len(texts) == 1:
        # A character's bytes come one by one: they are printed once they are complete.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        _print(texts[0])
        for (token,) in steps:
            if token is not None and token != EOD:
                _print(decoder.decode(bytes([token])))
        _print(decoder.decode(b"", final=True) + "\n")
        return
    rows: list[list[int]] = [[] for _ in texts]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    for i, (text, row) in enumerate(zip(texts, rows, strict=True)):
        _print(f"--- {i + 1} ---\n{text}{decode(row)}\n")


def _texts(prompts: list[str] | None) -> list[str]:
    texts = prompts or [""]
    if "-" in texts:
        stdin = read_stdin()
        texts = [stdin if text == "-" else text for text in texts]
    return texts


def _load(
    path: Path, device: torch.device, cache: tuple[int, int] | None
) -> tuple[Transformer, int]:
    """The model, and the longest document that it has seen.

    :param cache: how many rows of how many tokens must fit beside it.
    """
    from olmo_core.memory import expect_room
    from olmo_core.train.checkpoint import load_model
    from olmo_core.train.config import TrainConfig

    found, weights, problems = load_model(path)
    for problem in problems:
        print(f"{problem}; using {found.folder.name}", file=sys.stderr)
    config = TrainConfig.from_dict(found.config)
    model = config.model.build(init_device="meta")
    tensors = [*weights.values()]
    if cache is not None:
        with model.decoding(*cache):
            tensors += model.buffers()
    n_bytes = sum(tensor.nbytes for tensor in tensors)
    expect_room("the model and its caches (--max-tokens)", n_bytes, device)
    model.load_state_dict(weights, assign=True)
    return model.to(device).eval(), config.data.max_doc_len or config.data.sequence_length


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
