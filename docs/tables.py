"""Write the tables of README.md that follow from the code: ``python docs/tables.py``.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``. tests/test_readme.py fails while
one of them is out of date.
"""

from __future__ import annotations

from pathlib import Path

from olmo_core.cli.main import COMMANDS
from olmo_core.nn.attention.capabilities import CAPABILITIES
from olmo_core.nn.attention.kernels.softmax import Capabilities

README = Path(__file__).parents[1] / "README.md"


def commands() -> str:
    """The command line."""
    return _table(
        ["command", "what it does"],
        [[f"`olmo-core {name}`", about] for name, about in COMMANDS.items()],
    )


def backends() -> str:
    """One row for each attention backend, from the capability table."""
    header = ["backend", "library", "runs on", "dtypes", "head_dim", "does not do", "install"]
    return _table(header, [_backend(c) for c in CAPABILITIES.values()])


def _backend(c: Capabilities) -> list[str]:
    runs_on = "every device"
    if c.compute_capability is not None:
        first, last = (f"{major}.{minor}" for major, minor in c.compute_capability)
        runs_on = f"NVIDIA {first}" + ("" if first == last else " and newer")
    dtypes = ", ".join(str(d).removeprefix("torch.").replace("float", "fp") for d in c.dtypes)
    head_dim = "any" if c.max_head_dim is None else f"up to {c.max_head_dim}"
    if c.head_dim_multiple > 1:
        head_dim += f", multiple of {c.head_dim_multiple}"
    lacks = ", ".join(str(feature) for feature in c.missing) or "-"
    install = f"`{c.install}`" if c.install.startswith("pip ") else c.install or "-"
    return [f"`{c.name}`", c.title, runs_on, dtypes.replace("bfp", "bf"), head_dim, lacks, install]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {"commands": commands, "backends": backends}


def updated(text: str) -> str:
    """README's text with every table as the code has it now."""
    for name, table in TABLES.items():
        first, last = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, _, rest = text.partition(first)
        _, found, after = rest.partition(last)
        assert found, f"README.md has no table called {name}"
        text = f"{before}{first}{table()}\n{last}{after}"
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
