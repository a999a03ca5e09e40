"""The script that checks and times context parallelism on real ranks, on ranks over gloo."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.context_parallel import checked, main, parsed
from benchmarks.sharded import answers, composed, costs, refusals
from benchmarks.sharded.answers import expect_same_messages
from benchmarks.sharded.problems import Mask, log_normal, padded
from benchmarks.sharded.trace import Interval, hidden
from olmo_core.distributed.collectives import Traffic

ROOT = Path(__file__).parents[2]
MODULE = ("-m", "benchmarks.context_parallel")


def launch(
    folder: Path, ranks: int, *arguments: str, limit: float = 550
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {
        **os.environ, "OUT": str(folder), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
    }  # fmt: skip
    return subprocess.run(
        [*command, "--nproc-per-node", str(ranks), *arguments],
        capture_output=True, text=True, cwd=ROOT, env=environment, timeout=limit,
    )  # fmt: skip


def statuses(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Of each check by its name."""
    lines = re.findall(
        r"^  (passed|failed|skipped) +(\S.*?) +[\d.]+ s  ", done.stdout, re.MULTILINE
    )
    return {name: status for status, name in lines}


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.integers(1, 40) | st.just(-1),
)
def test_pairs_are_those_of_the_mask(lengths: list[int], window: int) -> None:
    ends = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    seen = sum(
        1
        for start, stop in pairwise(ends)
        for query in range(start, stop)
        for key in range(start, query + 1)
        if window < 0 or query - key < window
    )
    assert Mask("", ends, window).pairs == seen


def test_documents_fit_every_layout() -> None:
    ends = padded(log_normal(4096, 90), 16, 4096)
    assert ends[0] == 0 and ends[-1] == 4096
    assert all((b - a) % 16 == 0 and b > a for a, b in pairwise(ends))


def test_what_of_a_message_is_hidden() -> None:
    kernels = [Interval(25, 40), Interval(0, 10), Interval(5, 20)]
    messages = [Interval(0, 20), Interval(15, 35), Interval(40, 50)]
    assert hidden(messages, kernels) == pytest.approx([1.0, 0.75, 0.0])


def test_a_graph_with_a_message_in_it_is_found() -> None:
    expect_same_messages(Traffic(3, 64), Traffic(3, 64))
    with pytest.raises(AssertionError, match="eager mode sends"):
        expect_same_messages(Traffic(3, 64), Traffic(2, 48))


def test_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert parsed([]).parts == ["checks", "times", "trace", "train"]
    assert parsed(["times", "--tiny"]).parts == ["times"]
    assert parsed(["--mixer", "gated_delta_net"]).mixer == ["gdn", "gdn-plain"]
    with pytest.raises(SystemExit):
        parsed(["time"])
    assert "no such part: time. Choose from checks, times, trace, train." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed(["--mixer", "gqq"])
    assert "There is no mixer 'gqq'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed(["--mixer", "kernel"])  # once all layers
    assert "kernel is no layer" in capsys.readouterr().err
    assert parsed(["--mixer", "kernel", "--mixer", "gqa"]).mixer == ["gqa"]


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "0.5", "1e9"])
def test_patience_is_a_time(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed([f"--patience={text}"])
    assert f"{text} is not from 1 to 86400 seconds" in capsys.readouterr().err
    assert parsed(["--patience=1"]).patience == 1


def test_what_ranks_cannot_do_is_known_before_they_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(SystemExit, match="needs two ranks or more"):
        main(["checks", "--tiny"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("OUT", str(tmp_path / "file" / "out"))
    with pytest.raises(SystemExit, match=r"OUT=\S*out can't be written: Not a directory\."):
        main(["checks", "--tiny"])


def test_checks_that_nothing_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answers, "checks", lambda *_: ([], []))
    for module in (composed, costs, refusals):
        monkeypatch.setattr(module, "checks", lambda *_, **__: [])
    assert not checked(SimpleNamespace(say=print), parsed(["--only", "zzz"]))  # type: ignore[arg-type]
    assert capsys.readouterr().out == "no check's name contains 'zzz'.\n"


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_pass_every_check(tmp_path: Path) -> None:
    done = launch(tmp_path, 2, *MODULE, "checks")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    seen = statuses(done)
    assert "failed" not in seen.values()
    skipped = {name for name, status in seen.items() if status == "skipped"}
    for name in skipped:  # CPUs have none of it; and two ranks no hybrid
        assert re.search("hybrid|tp_cp|reduce-overhead|memory of keys|waits of the host", name)
    for style in ("zig_zag", "llama3", "balanced", "ulysses", "tp"):
        for mode in ("eager", "checkpointed", "compiled", "same bits again"):
            assert seen[f"torch {style} {mode}"] == "passed"
    for name in ("a killed rank ends the job", "the same, one queue a device"):
        assert seen[name] == "passed"
    rows = json.loads((tmp_path / "context_parallel.json").read_text())["checks"]
    assert {row["name"]: row["status"] for row in rows} == seen


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("only", ["hybrid", "tp_cp", "FSDP2"])
def test_four_ranks(tmp_path: Path, only: str) -> None:
    # Neither of these layers is compiled.
    arguments = ("checks", "--only", only, "--mixer", "mha", "--mixer", "gdn-plain")
    done = launch(tmp_path, 4, *MODULE, *arguments, "--no-launches")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    seen = statuses(done)
    assert list(seen.values()).count("passed") >= 3 and "failed" not in seen.values()


BROKEN = """
import os, sys, time
from benchmarks.context_parallel import main
from benchmarks.sharded import answers
from olmo_core.distributed import collectives
from olmo_core.nn.attention.parallel import ring

def instead(module, name, stand_in):
    real = getattr(module, name)
    setattr(module, name, lambda *arguments: stand_in(real, *arguments))

def alone(real, *arguments):
    if os.environ["RANK"] == "1":
        raise ValueError("this rank alone")
    return real(*arguments)

def asleep(real, *arguments):
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    return real(*arguments)

how = sys.argv.pop(1)
if how == "wrong":  # keys of later ranks are taken for those of earlier ones
    instead(ring, "ring_steps", lambda real, plan, rank, n: real(plan, n - 1 - rank, n))
elif how == "alone":
    instead(collectives, "exchange", alone)
elif how == "late":
    instead(answers, "worst", alone)
else:
    instead(collectives, "exchange", asleep)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("wrong", "is off by"),
        ("alone", "rank 1: ValueError: this rank alone"),
        ("late", "rank 1: ValueError: this rank alone"),
        ("asleep", "a rank does not answer"),
    ],
)
def test_what_is_broken_fails(tmp_path: Path, how: str, message: str) -> None:
    """A wrong schedule; a rank that leaves the others in the middle of an exchange, or after it;
    and one that never comes."""
    (tmp_path / "broken.py").write_text(BROKEN)
    arguments = ("checks", "--only", "zig_zag eager", "--mixer", "gqa", "--patience", "5")
    done = launch(tmp_path, 2, str(tmp_path / "broken.py"), how, *arguments)
    assert done.returncode != 0
    assert statuses(done) == {"torch zig_zag eager": "failed"}, done.stdout + done.stderr
    assert message in done.stdout and "0 passed, 1 failed" in done.stdout


TINY = """
import sys
import torch
from benchmarks.context_parallel import main
from benchmarks.sharded.problems import Attention
whole = Attention.whole
def no_room(self):
    if self.mask.name == "log-normal":
        raise torch.OutOfMemoryError("for this test")
    return whole(self)
Attention.whole = no_room
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_times_of_two_ranks(tmp_path: Path) -> None:
    """Every line of them once, with one problem that one device can't hold."""
    (tmp_path / "tiny.py").write_text(TINY)
    arguments = ("times", "trace", "train", "--tiny")
    done = launch(tmp_path, 2, str(tmp_path / "tiny.py"), *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    table = done.stdout.splitlines()
    assert max(map(len, table)) <= 100
    assert [line for line in table if "log-normal, one device*" in line]
    found = json.loads((tmp_path / "context_parallel.json").read_text())
    ways = {(row["mask"], row["way"]) for row in found["attention"]}
    for way in (
        "one device",
        "ring",
        "gather/1",
        "gather/2",
        "gather/all",
        "balanced/1",
        "ulysses",
    ):
        assert ("one document", way) in ways and ("documents 24-48", way) in ways
    assert ("window 32", "zig-zag gather/1") in ways and ("window 32", "ring") not in ways
    assert ("one document", "torch's own") in ways
    assert all(row["share"]["both"] > 0 for row in found["attention"] if "share" in row)
    assert len(found["plans"]) == 6 and len(found["delta"]) == 3 and len(found["trace"]) == 2
    rates = {row["way"]: row["tokens_per_second"] for row in found["train"]}
    assert len(rates) == 6 and all(isinstance(rate, float) for rate in rates.values()), rates
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


@pytest.mark.slow
@pytest.mark.distributed
def test_times_of_a_hybrid_on_four_ranks(tmp_path: Path) -> None:
    done = launch(tmp_path, 4, *MODULE, "times", "--tiny")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("ring x ulysses") == 4


STAND_INS = """
import sys
import torch
from torch.profiler import ProfilerActivity, profile
from benchmarks.context_parallel import main
from benchmarks.sharded import costs
from benchmarks.sharded.job import Job
from olmo_core.nn.attention.parallel import gather

def peak(call):
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events = found.profiler.kineto_results.events()
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most

if sys.argv.pop(1) == "kept":
    gathered = gather._gathered
    def keep(*arguments):
        kept = []
        for heads, keys, values in gathered(*arguments):
            kept.append(keys)
            yield heads, keys, values
    gather._gathered = keep
# gloo's threads let go of what was sent a little late
costs.peak = lambda call: min(peak(call) for _ in range(6))
costs.TOKENS = 256
Job.on_gpus, Job.shares_gpus = True, False
Job.dtype = torch.float32
Job.describe = lambda job: "CPUs in place of GPUs"
torch.cuda.synchronize = torch.cuda.set_sync_debug_mode = lambda *_: None
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("how", "only", "passes"),
    [
        ("right", "memory of keys", True),
        ("kept", "memory of keys, llama3/1", False),
        ("right", "waits of the host, balanced", True),
        ("right", "llama3 reduce-overhead", True),
    ],
)
def test_checks_for_gpus_with_stand_ins(tmp_path: Path, how: str, only: str, passes: bool) -> None:
    """What of them CPUs can show: that they run, and that the memory of keys is counted right."""
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    arguments = ("checks", "--only", only, "--mixer", "window", "--no-launches")
    done = launch(tmp_path, 2, str(tmp_path / "stand_ins.py"), how, *arguments)
    assert (done.returncode == 0) == passes, done.stdout[-3000:] + done.stderr[-3000:]
    assert set(statuses(done).values()) == {"passed" if passes else "failed"}
