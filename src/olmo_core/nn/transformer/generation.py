"""Sampling from a model, through its decoding caches or without them.

B: prompts, T: tokens so far (left padding included), V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from olmo_core.data.doc_lens import INT32_MAX
from olmo_core.exceptions import OLMoError
from olmo_core.nn.transformer.model import Transformer

# float32, in which tokens are drawn, has no normal number below: what divides by less is greedy.
_GREEDY = torch.finfo(torch.float32).tiny


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    end_token: int | Collection[int] | None = None,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Continue prompts together, token by token.

    Prompts of different length are padded on the left. The model leaves its caches when the
    iterator ends or is closed.

    :param prompts: B prompts of at least one token each.
    :param max_new_tokens: the most tokens of each continuation.
    :param temperature: divides the logits; 0 (and below 1.2e-38) takes the likeliest token.
    :param top_p: sample from the fewest tokens whose probabilities sum to at least this
        (nucleus sampling, Holtzman et al., 2020, arXiv:1904.09751).
    :param seed: each prompt draws from a generator of its own, seeded ``seed + its index``.
    :param end_token: a row that draws it, or one of several, is finished.
    :param use_cache: ``False`` runs the whole sequence for each token: slow, for comparison.
    :returns: for each step the new token of each prompt, ``None`` once it is finished.
    :raises ValueError: for no prompt, an empty prompt, or options out of range.
    :raises OLMoError: in a step whose logits are not finite.
    """
    check_request(prompts, max_new_tokens, temperature, top_p, seed)
    ends = frozenset([end_token] if isinstance(end_token, int) else end_token or ())
    return _steps(model, prompts, max_new_tokens, temperature, top_p, seed, ends, use_cache)


def _steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    ends: frozenset[int],
    use_cache: bool,
) -> Iterator[list[int | None]]:
    device = model.device
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(p)) + list(p) for p in prompts]
    tokens = torch.tensor(padded, device=device)
    leftpad = torch.tensor([longest - len(p) for p in prompts], dtype=torch.int32, device=device)
    # Without padding the layers take their faster path.
    pad = leftpad if int(leftpad.max()) else None
    generators = [torch.Generator(device).manual_seed(seed + i) for i in range(len(prompts))]
    finished = [False] * len(prompts)
    training = model.training
    model.eval()
    if use_cache:
        model.init_kv_cache(len(prompts), longest + max_new_tokens)
    try:
        new = tokens
        for step in range(max_new_tokens):
            first = step == 0 or not use_cache
            with torch.no_grad():
                logits = model(new, cache_leftpad=pad if first else None, logits_to_keep=1)[:, -1]
            chosen = sample(logits, temperature, top_p, generators)
            out: list[int | None] = [
                None if done else token
                for done, token in zip(finished, chosen.tolist(), strict=True)
            ]
            finished = [done or token in ends for done, token in zip(finished, out, strict=True)]
            yield out
            if all(finished):
                return
            new = chosen[:, None] if use_cache else torch.cat([new, chosen[:, None]], dim=1)
    finally:
        model.drop_kv_cache()
        model.train(training)


def sample(
    logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]
) -> Tensor:
    """Draw a token for each row.

    :param logits: (B, V).
    :returns: (B,) int64.
    :raises OLMoError: if the logits are not finite.
    """
    scores = logits.float()
    top = scores.amax(-1, keepdim=True)  # NaN or infinite if one of them is
    if not bool(top.isfinite().all()):
        raise OLMoError(
            "the model's logits are not finite: its weights have diverged, or its dtype is too "
            "narrow for them"
        )
    if temperature < _GREEDY:
        return logits.argmax(-1)
    p = torch.softmax((scores - top) / temperature, dim=-1)
    if top_p < 1:
        ordered, index = p.sort(dim=-1, descending=True)
        # A token stays while those before it have not reached top_p: the first always stays.
        passed = ordered.cumsum(-1) - ordered >= top_p
        passed[:, 0] = False
        p = torch.zeros_like(p).scatter(-1, index, ordered.masked_fill(passed, 0))
    rows = [torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)]
    return torch.cat(rows)


def check_request(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """What :func:`generate` refuses, before there is a model.

    :raises ValueError: as there.
    """
    if not prompts:
        raise ValueError("there is no prompt: give at least one")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} has no tokens: start it with the end-of-document token")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if max(map(len, prompts)) + max_new_tokens > INT32_MAX:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} leads beyond position {INT32_MAX}, the last of int32"
        )
    if not (seed >= -(2**63) and seed + len(prompts) <= 2**64):
        raise ValueError(
            f"seed must lie in [-2**63, 2**64 - {len(prompts)}], each prompt takes the next one, "
            f"got {seed}"
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
