"""Run every benchmark, or those named, and write what each prints into ``RESULTS.md``.

    python -m benchmarks [NAME ...]

A section of ``RESULTS.md`` holds a benchmark's docstring, the machine and its output; each run
replaces it.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"


def machine() -> str:
    """The machine in one line: processor, cores, GPU, versions."""
    import torch

    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists() and (found := re.search(r"model name\s*: (.+)", info.read_text())):
        processor = found[1]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return (
        f"{processor}, {os.cpu_count()} cores, {threads} thread(s){gpu}; "
        f"Python {platform.python_version()}, torch {torch.__version__}; {date.today()}"
    )


def section(name: str, output: str) -> str:
    source = (HERE / f"{name}.py").read_text(encoding="utf-8")
    about = ast.get_docstring(ast.parse(source)) or ""
    return f"## {name}\n\n{about}\n\n{machine()}\n\n```text\n{output.rstrip()}\n```\n"


def replace_section(text: str, name: str, new: str) -> str:
    old = re.compile(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if old.search(text):
        return old.sub(lambda _: new + "\n", text).rstrip() + "\n"
    return text.rstrip() + "\n\n" + new


def main(names: list[str]) -> int:
    known = sorted(p.stem for p in HERE.glob("*.py") if not p.stem.startswith("_"))
    unknown = sorted(set(names) - set(known))
    if unknown:
        print(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or known:
        print(f"== {name}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE.parent,
        )
        print(done.stdout, flush=True)
        if done.returncode != 0:
            failed.append(name)
            continue
        text = replace_section(
            RESULTS.read_text(encoding="utf-8"), name, section(name, done.stdout)
        )
        RESULTS.write_text(text, encoding="utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
