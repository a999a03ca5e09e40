"""What ``import olmo_core.nn.attention`` adds to ``import torch``.

Importing a layer should cost next to nothing beside torch itself (seconds): what is optional or
slow loads when it is used. Each sample is a fresh interpreter with warm file caches, and the clock
starts when torch is already there, so torch's jitter is not in the number. Target: under 150 ms.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

SAMPLES = 9
TARGET_MS = 150
SCRIPT = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import olmo_core.nn.attention
print(middle - start, time.perf_counter() - middle)
"""


def sample() -> tuple[float, float]:
    """Milliseconds of torch, and of this library after it."""
    source = str(Path(__file__).parents[1] / "src")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )
    torch_s, ours_s = map(float, done.stdout.split())
    return 1e3 * torch_s, 1e3 * ours_s


def main() -> None:
    sample()  # writes the bytecode files
    torch_ms, ours_ms = zip(*(sample() for _ in range(SAMPLES)), strict=True)
    base, added = statistics.median(torch_ms), statistics.median(ours_ms)
    verdict = "met" if added < TARGET_MS else "MISSED"
    print(f"import torch                      {base:8.0f} ms")
    print(f"then olmo_core.nn.attention       {added:8.0f} ms   (median of {SAMPLES})")
    print(f"target: under {TARGET_MS} ms, {verdict}")
    print(json.dumps({"torch_ms": base, "added_ms": added, "target_ms": TARGET_MS}))


if __name__ == "__main__":
    main()
