"""The tokenizer that comes with a model: text to tokens, tokens to text, and its chat template.

Needs the package ``tokenizers``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olmo_core.data import EOD, DataError
from olmo_core.data.vocabulary import read_tokenizer
from olmo_core.hf.config import PretrainedError
from olmo_core.hf.folder import CONFIG, read_json
from olmo_core.hf.gguf import GGUFFile

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
Message = dict[str, str]
"""``role`` ("system", "user" or "assistant") and ``content``."""

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How GGUF names the cutting of text before byte-level BPE. None is GPT-2's own expression.
_SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LETTERS + r"\p{N}{1,3}" + _REST,
    "qwen2": _LETTERS + r"\p{N}" + _REST,
}
_SINGLE_DIGITS = ("smollm",)
_CONTROL, _USER_DEFINED = 3, 4


class Tokenizer:
    """A tokenizer with what its model's files say about it.

    :param backend: the tokenizer proper.
    :param stop_tokens: tokens that end a text.
    :param chat_template: a Jinja template of messages, if the model is for chat.
    :param special_tokens: strings by name ("bos_token", ...), which templates use.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        stop_tokens: Iterable[int] = (),
        chat_template: str | None = None,
        special_tokens: dict[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.stop_tokens = frozenset(stop_tokens)
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}

    def encode(self, text: str) -> list[int]:
        """The tokens of a text that is to be continued, those that start a text included."""
        return list(self.backend.encode(text).ids)

    def token_ids(self) -> dict[str, Any]:
        """The special tokens' numbers as ``config.json`` has them."""
        stops = sorted(self.stop_tokens)
        names = {"bos_token_id": "bos_token", "pad_token_id": "pad_token"}
        ids = {
            key: self.backend.token_to_id(self.special_tokens[name])
            for key, name in names.items()
            if name in self.special_tokens
        }
        return {**ids, "eos_token_id": stops[0] if len(stops) == 1 else stops or None}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones left out."""
        return str(self.backend.decode(list(tokens)))

    def stream(self) -> Callable[[int], str]:
        """A function from each token to the text that it completes."""
        from tokenizers.decoders import DecodeStream

        stream = DecodeStream(skip_special_tokens=True)
        return lambda token: stream.step(self.backend, token) or ""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the model answers.

        :raises PretrainedError: without a template, or if it refuses the messages.
        """
        return list(self.backend.encode(self.render_chat(messages), add_special_tokens=False).ids)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The conversation as text; see :meth:`encode_chat`."""
        if self.chat_template is None:
            raise PretrainedError("this model has no chat template: leave --chat out")
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise TemplateError(message)

        # A template is a program from a file: the sandbox gives it no way to the machine.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.globals |= {"raise_exception": refuse, "strftime_now": _now}
        try:
            template = environment.from_string(self.chat_template)
            return template.render(
                messages=list(messages), add_generation_prompt=True, **self.special_tokens
            )
        except (TemplateError, TypeError) as error:
            raise PretrainedError(f"the chat template refuses: {error}") from error


def load_tokenizer(source: str | Path | GGUFFile) -> Tokenizer:
    """The tokenizer of a folder of transformers, or of a GGUF file.

    :raises PretrainedError: if it is missing, damaged, or of a kind that is not supported.
    """
    if isinstance(source, GGUFFile):
        return _from_gguf(source)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".json":
        return Tokenizer(read_backend(path))
    with GGUFFile(path) as file:
        return _from_gguf(file)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the files that transformers and :func:`load_tokenizer` read."""
    tokenizer.backend.save(str(folder / TOKENIZER))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    ids = {name: value for name, value in tokenizer.token_ids().items() if value is not None}
    for name, values in (("tokenizer_config.json", config), ("generation_config.json", ids)):
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def byte_tokenizer() -> Tokenizer:
    """The vocabulary of :mod:`olmo_core.data.tokens` as a tokenizer: bytes, and EOD around them."""
    tokenizers = _tokenizers()
    end = "<|endoftext|>"
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={_byte_character(i): i for i in range(256)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([end])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{end} $A", special_tokens=[(end, EOD)]
    )
    special = {"bos_token": end, "eos_token": end}
    return Tokenizer(backend, stop_tokens=[EOD], special_tokens=special)


def _byte_character(byte: int) -> str:
    """GPT-2's character for a byte: itself where it can be seen, else the next free ones."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return chr(byte) if byte in visible else chr(256 + hidden.index(byte))


def read_backend(path: Path) -> tokenizers.Tokenizer:
    """:raises PretrainedError: if the file or the package is missing, or is no tokenizer."""
    try:
        return read_tokenizer(path)
    except DataError as error:
        raise PretrainedError(str(error)) from error


def _from_folder(folder: Path) -> Tokenizer:
    backend = read_backend(folder / TOKENIZER)
    optional = {
        name: read_json(folder / name) if (folder / name).exists() else {}
        for name in ("tokenizer_config.json", "generation_config.json", CONFIG)
    }
    config = optional["tokenizer_config.json"]
    special = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
    stops: set[int] = set()
    for name in ("generation_config.json", CONFIG):
        stops |= _token_ids(optional[name].get("eos_token_id"))
    if "eos_token" in special:
        stops |= _token_ids(backend.token_to_id(special["eos_token"]))
    return Tokenizer(
        backend,
        stop_tokens=stops,
        chat_template=_template(folder, config.get("chat_template")),
        special_tokens=special,
    )


def _token_ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {token for token in values if isinstance(token, int)}


def _template(folder: Path, value: Any) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    if isinstance(value, list):  # several by name
        value = {each.get("name"): each.get("template") for each in value}.get("default")
    return value if isinstance(value, str) else None


def _from_gguf(file: GGUFFile) -> Tokenizer:
    tokenizers = _tokenizers()

    def get(name: str) -> Any:
        return file.tokenizer_field(f"ggml.{name}")

    kind, split = get("model"), get("pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise PretrainedError(
            f"{file.path} has a tokenizer of kind {kind!r}, cut as {split!r}: supported is 'gpt2' "
            f"with {', '.join(_SPLITS)}. Give a {TOKENIZER} with --tokenizer."
        )
    tokens, merges = get("tokens"), get("merges")
    types = get("token_type") or []
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=split == "llama-bpe",
        )
    )
    parts: list[Any] = []
    if split in _SINGLE_DIGITS:
        parts.append(tokenizers.pre_tokenizers.Digits(individual_digits=True))
    expression = _SPLITS[split]
    if expression is not None:
        parts.append(
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(expression), behavior="isolated")
        )
    parts.append(
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(parts)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([t for t, kind in zip(tokens, types) if kind == _CONTROL])
    backend.add_tokens(
        [
            tokenizers.AddedToken(t, normalized=False)
            for t, kind in zip(tokens, types)
            if kind == _USER_DEFINED
        ]
    )
    special = {}
    for name in ("bos", "eos", "unknown", "padding"):
        token = get(f"{name}_token_id")
        if token is not None:
            special[{"unknown": "unk", "padding": "pad"}.get(name, name) + "_token"] = tokens[token]
    if get("add_bos_token"):
        bos = special["bos_token"]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, get("bos_token_id"))]
        )
    stops = {get(name) for name in ("eos_token_id", "eot_token_id")} - {None}
    return Tokenizer(
        backend,
        stop_tokens=stops,
        chat_template=file.tokenizer_field("chat_template"),
        special_tokens=special,
    )


def _tokenizers() -> Any:
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.processors
    except ImportError as error:
        raise PretrainedError(
            "the model's tokenizer needs the package tokenizers: pip install tokenizers"
        ) from error
    return tokenizers


def _now(format: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(format)
