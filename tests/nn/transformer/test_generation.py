"""Cached = full, through one interface for attention and recurrent layers, and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olmo_core.config import DType
from olmo_core.exceptions import OLMoError
from olmo_core.nn.attention import AttentionConfig, SlidingWindowAttentionConfig
from olmo_core.nn.attention.base import SequenceMixer, SequenceMixerConfig
from olmo_core.nn.attention.decoding.cache import DecodingCache
from olmo_core.nn.rope import RoPEConfig
from olmo_core.nn.transformer import (
    Transformer,
    TransformerBlockConfig,
    TransformerConfig,
    generate,
)
from olmo_core.nn.transformer.generation import sample

VOCAB = 19


class DecayCache(DecodingCache):
    """The states after the last tokens, newest last: as many as can be asked back."""

    def __init__(self, batch: int, max_seq_len: int, d: int, max_rollback: int) -> None:
        super().__init__(batch, max_seq_len, max_rollback)
        kind = ((batch, max_rollback + 1, d), torch.float64)
        self._allocate(batch, max_seq_len, "cpu", {"states": kind})

    def _restore(self, n_tokens: int) -> None:
        self.states.copy_(self.states.roll(n_tokens, 1))


class Decay(SequenceMixer):
    """A recurrent mixer: s_t = s_{t-1} / 2 + w x_t, zero at padding."""

    kv_cache_manager: DecayCache | None

    def __init__(self, d: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.w = nn.Linear(d, d, bias=False, dtype=dtype, device=device)

    def forward(
        self, x: Tensor, cu_doc_lens: Tensor | None = None, *,
        cache_leftpad: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        assert cu_doc_lens is None
        cache = self.kv_cache_manager or DecayCache(x.shape[0], x.shape[1], x.shape[2], 0)
        padding = cache.admit(x, cache_leftpad, parameters=self.parameters())
        states = list(cache.states.unbind(1))
        for t, y in enumerate(self.w(x).unbind(1)):
            state = states[-1] / 2 + y
            states.append(state if padding is None else state.masked_fill(padding[:, t, None], 0))
        cache.states.copy_(torch.stack(states[-cache.states.shape[1] :], 1))
        cache.update_seqlen(x.shape[1], cache_leftpad)
        return torch.stack(states[-x.shape[1] :], 1)

    def init_weights(self, *, init_method: Any, generator: Any = None, **options: Any) -> None:
        init_method.init_linear_(self.w.weight, generator=generator, **options)

    def num_flops_per_token(self, seq_len: int) -> int:
        return 6 * self.w.weight.numel()

    def init_kv_cache_manager(
        self, batch_size: int, max_seq_len: int, *, max_rollback: int = 0
    ) -> None:
        self.kv_cache_manager = DecayCache(
            batch_size, max_seq_len, self.w.in_features, max_rollback
        )


@SequenceMixerConfig.register("decay for tests")
@dataclass
class DecayConfig(SequenceMixerConfig[Decay]):
    dtype: DType = DType.float32

    def num_params(self, d_model: int) -> int:
        return d_model**2

    def build(self, d_model: int, *, init_device: str = "cpu", **_: Any) -> Decay:
        return Decay(d_model, self.dtype.as_pt(), init_device)


def build(kind: str) -> Transformer:
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, rope=RoPEConfig(theta=100), bias=False)
    if kind == "window":
        attention.sliding_window = SlidingWindowAttentionConfig([5])
    if kind == "ngpt":
        attention = AttentionConfig(name="normalized", n_heads=2, rope=RoPEConfig())
    name = "ngpt" if kind == "ngpt" else "pre_norm"
    blocks = [TransformerBlockConfig(name=name, sequence_mixer=attention)]
    if kind == "hybrid":
        blocks.insert(0, TransformerBlockConfig(sequence_mixer=DecayConfig()))
    model = TransformerConfig(
        d_model=16, vocab_size=VOCAB, n_layers=4, blocks=blocks, init_std=0.5,
        init_method="fan_in", dtype="float64",
    ).build()  # fmt: skip
    model.init_weights(seed=0)
    return model.requires_grad_(False).eval()


KINDS = ["full", "window", "ngpt", "hybrid"]


def tokens(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_through_the_cache_equal_the_full_forward(kind: str) -> None:
    model, ids = build(kind), tokens(2, 20)
    full = model(ids)
    with model.decoding(2, 20, max_rollback=3):
        for _ in range(2):  # the second time on reset caches
            chunks = [model(chunk) for chunk in ids.split([7, 1, 1, 4, 1, 6], dim=1)]
            torch.testing.assert_close(torch.cat(chunks, 1), full, rtol=1e-10, atol=1e-10)
            model.reset_kv_cache()
    torch.testing.assert_close(model(ids), full)


@pytest.mark.parametrize("kind", KINDS)
def test_rollback_forgets_drafts(kind: str) -> None:
    model, ids, drafts = build(kind), tokens(2, 14), tokens(2, 17)[:, 14:]
    full = model(ids)
    with model.decoding(2, 20, max_rollback=3):
        model(ids[:, :9])
        model(drafts)
        model.rollback(3)
        torch.testing.assert_close(model(ids[:, 9:10]), full[:, 9:10], rtol=1e-10, atol=1e-10)
        model(drafts[:, :2])
        model.rollback(2)
        torch.testing.assert_close(model(ids[:, 10:]), full[:, 10:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cached", [False, True])
def test_left_padded_rows_equal_rows_alone(kind: str, cached: bool) -> None:
    model, rows = build(kind), [tokens(1, n) for n in (9, 4, 6)]
    leftpad = torch.tensor([0, 5, 3], dtype=torch.int32)
    ids = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    if cached:
        with model.decoding(3, 12):
            parts = [model(ids[:, :7], cache_leftpad=leftpad), model(ids[:, 7:8])]
            logits = torch.cat([*parts, model(ids[:, 8:])], 1)
    else:
        logits = model(ids, cache_leftpad=leftpad)
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            logits[i, int(leftpad[i]) :], model(row)[0], rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_with_and_without_cache_together_and_alone(kind: str) -> None:
    model = build(kind)
    prompts = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3]]
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
    together = list(generate(model, prompts, **options))
    assert together == list(generate(model, prompts, use_cache=False, **options))
    for i, prompt in enumerate(prompts):
        assert [[step[i]] for step in together] == list(generate(model, [prompt], **options))
    assert all(mixer.kv_cache_manager is None for mixer in model.mixers)
    ids = torch.tensor([prompts[0]])
    for step in together:
        assert step[0] == int(model(ids)[0, -1].argmax())
        ids = torch.cat([ids, torch.tensor([[step[0]]])], 1)


def test_sampling_depends_on_the_seed_alone() -> None:
    model = build("full")
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.5, "top_p": 0.9}
    one = list(generate(model, [[1], [1]], seed=5, **options))
    torch.manual_seed(123)
    assert one == list(generate(model, [[1], [1]], seed=5, use_cache=False, **options))
    assert one != list(generate(model, [[1], [1]], seed=6, **options))
    assert [a for a, _ in one] != [b for _, b in one]
    assert [[b] for _, b in one] == list(generate(model, [[1]], seed=6, **options))


def test_sample_keeps_the_nucleus() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]

    def frequencies(temperature: float, top_p: float) -> Tensor:
        drawn = sample(p.log().expand(4000, -1), temperature, top_p, generators)
        return torch.bincount(drawn, minlength=4) / 4000

    def expected(*weights: float) -> Tensor:
        return torch.tensor(weights) / sum(weights)

    torch.testing.assert_close(frequencies(1, 1), p, atol=0.03, rtol=0)
    close = {"atol": 0.03, "rtol": 0.0}
    torch.testing.assert_close(frequencies(1, 0.81), expected(0.5, 0.3, 0.15, 0), **close)
    torch.testing.assert_close(frequencies(1, 0.79), expected(0.5, 0.3, 0, 0), **close)
    torch.testing.assert_close(frequencies(0.5, 1), expected(*(p**2).tolist()), **close)
    assert frequencies(1, 1e-9).tolist() == [1, 0, 0, 0]
    assert frequencies(0, 1).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extreme_temperatures_and_nuclei(dtype: torch.dtype) -> None:
    logits = (torch.randn(5, VOCAB) * 30).to(dtype)
    logits[0] = (
        min(torch.finfo(dtype).max, 1e38) / 4
    )  # equal, and far beyond what can be exponentiated
    greedy = logits.argmax(-1)
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    # 5e-324 is the least number above zero; the last three are below float32's normal ones.
    for temperature in (0.0, 1e-9, 1.2e-38, 1.1e-38, 1e-39, 5e-324):
        drawn = sample(logits, temperature, 1.0, generators)
        rows = slice(None) if temperature < 1.18e-38 else slice(1, None)  # equal ones are drawn
        assert torch.equal(drawn[rows], greedy[rows]), temperature
    for top_p in (1e-9, 1e-300, 5e-324):
        assert torch.equal(sample(logits, 1e-3, top_p, generators)[1:], greedy[1:]), top_p
    hot = sample(torch.randn(4000, 4).to(dtype), 1e300, 1.0, [generators[0]] * 4000)
    assert (hot.bincount(minlength=4) / 4000 - 0.25).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(temperature: float, value: float) -> None:
    model = build("full")
    model.lm_head.norm.weight[3] = value  # type: ignore[union-attr, index]
    with pytest.raises(OLMoError, match="the model's logits are not finite"):
        list(generate(model, [[1, 2]], max_new_tokens=3, temperature=temperature))
    assert all(mixer.kv_cache_manager is None for mixer in model.mixers)


def test_end_token_finishes_rows_one_by_one() -> None:
    model = build("full")
    plain = list(generate(model, [[1], [2]], max_new_tokens=12, seed=2))
    end = plain[3][0]
    assert end is not None
    first = [next(i for i, step in enumerate(plain) if step[row] == end) if any(
        step[row] == end for step in plain) else 12 for row in (0, 1)]  # fmt: skip
    ended = list(generate(model, [[1], [2]], max_new_tokens=12, seed=2, end_token=end))
    assert len(ended) == min(12, max(first) + 1)
    for i, step in enumerate(ended):
        for row in (0, 1):
            assert step[row] == (plain[i][row] if i <= first[row] else None)


def test_a_closed_iterator_leaves_the_caches_and_the_mode() -> None:
    model = build("hybrid").train()
    steps = generate(model, [[1, 2]], max_new_tokens=50)
    next(steps)
    steps.close()
    assert model.training and all(mixer.kv_cache_manager is None for mixer in model.mixers)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no prompt": (lambda m: generate(m, [], max_new_tokens=1), ValueError, "no prompt"),
    "empty prompt": (lambda m: generate(m, [[1], []], max_new_tokens=1), ValueError, "prompt 1"),
    "no new tokens": (lambda m: generate(m, [[1]], max_new_tokens=0), ValueError, "got 0"),
    "negative temperature": (
        lambda m: generate(m, [[1]], max_new_tokens=1, temperature=-1), ValueError, "got -1",
    ),
    "NaN temperature": (
        lambda m: generate(m, [[1]], max_new_tokens=1, temperature=float("nan")), ValueError, "nan",
    ),
    "top_p of nothing": (
        lambda m: generate(m, [[1]], max_new_tokens=1, top_p=0), ValueError, "top_p",
    ),
    "top_p above one": (
        lambda m: generate(m, [[1]], max_new_tokens=1, top_p=1.1), ValueError, "top_p",
    ),
    "past int32": (
        lambda m: generate(m, [[1]], max_new_tokens=2**31), ValueError, "position 2147483647",
    ),
    "seed past 64 bits": (
        lambda m: generate(m, [[1]], max_new_tokens=1, seed=2**64), ValueError, "seed must lie",
    ),
    "second seed past 64 bits": (
        lambda m: generate(m, [[1]] * 2, max_new_tokens=1, seed=2**64 - 1), ValueError, "seed must",
    ),
    "seed below 64 bits": (
        lambda m: generate(m, [[1]], max_new_tokens=1, seed=-(2**63) - 1), ValueError, "seed must",
    ),
    "reset without cache": (lambda m: m.reset_kv_cache(), RuntimeError, "init_kv_cache"),
    "rollback without cache": (lambda m: m.rollback(1), RuntimeError, "init_kv_cache"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(build("full"))


def test_the_last_seeds_work() -> None:
    for seed in (2**64 - 2, -(2**63)):
        assert len(list(generate(build("full"), [[1], [2]], max_new_tokens=1, seed=seed))) == 1


def test_limits_of_the_caches() -> None:
    model = build("hybrid")
    with model.decoding(1, 4, max_rollback=1):
        model(tokens(1, 3))
        with pytest.raises(ValueError, match="at most 1"):
            model.rollback(2)
        model.rollback(1)
        with pytest.raises(RuntimeError, match=r"overflow|at most 4"):
            model(tokens(1, 3))
    with pytest.raises(ValueError, match="room"):
        model.init_kv_cache(0, 4)
    assert all(mixer.kv_cache_manager is None for mixer in model.mixers)


def test_all_layers_roll_back_or_none() -> None:
    """A later layer that refuses left the earlier ones rolled back."""
    model, ids = build("hybrid"), tokens(1, 12)
    full = model(ids)
    with model.decoding(1, 12, max_rollback=3):
        model(ids[:, :6])
        model.mixers[2].kv_cache_manager.max_rollback = 1
        model.mixers[2].kv_cache_manager.restorable = 1
        with pytest.raises(ValueError, match="now restore 1"):
            model.rollback(2)
        assert {mixer.kv_cache_manager.host_seqlen for mixer in model.mixers} == {6}
        torch.testing.assert_close(model(ids[:, 6:]), full[:, 6:], rtol=1e-10, atol=1e-10)


def test_layers_that_disagree_after_a_failure_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("window"), tokens(1, 12)
    full = model(ids)
    with model.decoding(1, 12, max_rollback=1):
        model(ids[:, :6])
        with monkeypatch.context() as m:
            m.setattr(model.mixers[2], "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[:, 6:])
        for call in (lambda: model(ids[:, 6:]), lambda: model.rollback(1)):
            with pytest.raises(RuntimeError, match=r"\[12, 12, 6, 6\]: an earlier call failed"):
                call()
        model.reset_kv_cache()
        torch.testing.assert_close(model(ids), full, rtol=1e-10, atol=1e-10)
        model.mixers[1].kv_cache_manager = None
        with pytest.raises(RuntimeError, match="some layers have no cache"):
            model(ids)
