"""``verify`` sees what is broken: each kernel here is wrong in one way, and one way alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gloo_ranks import pool
from olmo_core.diagnostics import properties, sharded
from olmo_core.diagnostics.machine import probe_head_dim
from olmo_core.diagnostics.mixers import MIXERS
from olmo_core.diagnostics.subject import Subject
from olmo_core.diagnostics.verify import KERNEL, Cell, Outcome, cells, mixer_names, run
from olmo_core.exceptions import OLMoConfigurationError
from olmo_core.nn.attention.capabilities import CAPABILITIES
from olmo_core.nn.attention.kernels.softmax import Feature, get_kernel, register_kernel
from olmo_core.nn.attention.segments import Segments

CPU = torch.device("cpu")


class Broken:
    """Torch's kernel with a fault of ``kind``."""

    name = "torch"

    def __init__(self, kind: str):
        self.kind, self.good = kind, get_kernel("torch")

    def segments(self, s: Segments, q: Tensor, k: Tensor) -> Segments:
        if self.kind == "window off by one" and s.window > 0:
            return replace(s, window=s.window + 1)
        if self.kind == "documents leak" and s.cu_q is not None:
            n_q, n_k = (x.shape[0] * x.shape[1] for x in (q, k))  # all are one document
            cu_q, cu_k = (torch.tensor([0, n], dtype=torch.int32) for n in (n_q, n_k))
            return replace(s, cu_q=cu_q, cu_k=cu_k, max_q=n_q, max_k=n_k)
        return s

    def forward(self, q: Tensor, k: Tensor, v: Tensor, s: Segments, **kwargs: Any) -> Any:
        out, lse, rng = self.good.forward(q, k, v, self.segments(s, q, k), **kwargs)
        return out, lse / math.log(2) if self.kind == "lse in base 2" else lse, rng

    def backward(self, dout: Tensor, *args: Any, **kwargs: Any) -> Any:
        q, k, v, out, lse, rng, s = args
        if self.kind == "lse in base 2":  # consistent with its own forward
            lse = lse * math.log(2)
        s = self.segments(s, q, k)
        dq, dk, dv = self.good.backward(dout, q, k, v, out, lse, rng, s, **kwargs)
        return dq, dk * 1.01 if self.kind == "dk" else dk, dv


@pytest.fixture
def broken() -> Iterator[Any]:
    good = get_kernel("torch")
    yield lambda kind: register_kernel(Broken(kind))
    register_kernel(good)


def check(
    mixers: list[str], dtype: torch.dtype = torch.float32, *, sharded: bool = False
) -> dict[tuple[str, str], Outcome]:
    """The outcomes by mixer and property; of the sharded cells, which start processes, if asked."""
    todo = [c for c in cells(mixers, ["torch"]) if c.dtype == dtype]
    todo = [c for c in todo if sharded or not c.is_sharded]
    return {(o.cell.mixer, o.cell.prop): o for o in run(todo, CPU)}


@pytest.fixture
def ranks() -> None:
    """The sharded cells' ranks are those of all tests, not two more."""
    sharded.use_ranks(pool(2), 2)


def failed(outcomes: dict[tuple[str, str], Outcome]) -> set[tuple[str, str]]:
    return {key for key, o in outcomes.items() if o.status == "failed"}


@pytest.mark.distributed
def test_nothing_fails_as_it_is(ranks: None) -> None:
    outcomes = check(["kernel", "gqa", "window"], sharded=True)
    assert not failed(outcomes)
    assert all(o.status == "passed" for o in outcomes.values())
    assert {"zig_zag", "llama3", "balanced", "ulysses"} <= {prop for _, prop in outcomes}


@pytest.mark.distributed
def test_the_gated_delta_net_keeps_the_promise(ranks: None) -> None:
    outcomes = check(["gated_delta_net"], sharded=True)
    assert not failed(outcomes)
    assert outcomes["gdn", "rollback"].status == "passed"
    assert all(o.status == "passed" for o in outcomes.values())


def test_a_forgetful_convolution_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are ignored by a part of the layer alone."""
    from olmo_core.nn.attention.gated_delta_net import GatedDeltaNet

    forward = GatedDeltaNet.forward

    def leaks(
        self: GatedDeltaNet, x: Tensor, cu_doc_lens: Tensor | None = None, **kw: Any
    ) -> Tensor:
        if cu_doc_lens is not None and len(cu_doc_lens) > 3:
            cu_doc_lens = cu_doc_lens[[0, *range(2, len(cu_doc_lens))]]  # one border is lost
        return forward(self, x, cu_doc_lens, **kw)

    monkeypatch.setattr(GatedDeltaNet, "forward", leaks)
    assert {("gdn-plain", "documents"), ("gdn-plain", "separate")} <= failed(check(["gdn-plain"]))


def test_leaking_documents_fail(broken: Any) -> None:
    broken("documents leak")
    wrong = failed(check(["kernel", "gqa"]))
    assert {(KERNEL, "documents"), ("gqa", "documents"), ("gqa", "separate")} <= wrong
    assert ("gqa", "whole") not in wrong and (KERNEL, "window") not in wrong


def test_a_window_off_by_one_fails(broken: Any) -> None:
    broken("window off by one")
    wrong = failed(check(["kernel", "window", "window-70"]))
    assert {(KERNEL, "window"), ("window", "whole"), ("window-70", "documents")} <= wrong
    # Wrong alike in both, which is why there is a reference too.
    assert ("window", "separate") not in wrong and (KERNEL, "backward") not in wrong


def test_a_wrong_gradient_fails(broken: Any) -> None:
    broken("dk")
    outcomes = check(["kernel", "gqa"])
    assert outcomes[KERNEL, "backward"].tensor == "dk"
    assert {(KERNEL, "backward"), ("gqa", "whole"), ("gqa", "documents")} <= failed(outcomes)
    assert not failed(outcomes) & {("gqa", "decode"), ("gqa", "chunks")}


def test_a_wrong_log_sum_exp_fails_though_its_own_backward_undoes_it(broken: Any) -> None:
    broken("lse in base 2")
    assert failed(check(["kernel", "gqa"])) == {(KERNEL, "lse"), (KERNEL, "ring_cp")}
    assert (KERNEL, "lse") in failed(check(["kernel"], torch.bfloat16))


def test_an_exception_is_a_failed_cell_and_the_others_go_on(
    broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of order\nmore")

    monkeypatch.setattr(Broken, "backward", explode)
    broken("none")
    outcomes = check(["kernel"])
    assert outcomes[KERNEL, "window"].reasons == ("RuntimeError: out of order",)
    assert outcomes[KERNEL, "kv_cache"].status == "passed"


def test_nan_fails(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Broken, q: Tensor, *args: Any, **kwargs: Any) -> Any:
        out, lse, rng = self.good.forward(q, *args, **kwargs)
        out[0, 3] = math.nan
        return out, lse, rng

    monkeypatch.setattr(Broken, "forward", forward)
    broken("none")
    outcome = check(["kernel"])[KERNEL, "window"]
    assert outcome.status == "failed"
    assert outcome.as_dict()["error"] == "nan"


def sharded_cell(prop: str) -> Outcome:
    (outcome,) = run([Cell("gqa", "torch", torch.float32, prop)], CPU)
    return outcome


@pytest.mark.distributed
def test_heads_dealt_to_ranks(ranks: None) -> None:
    """Each class; and what does not suit the heads is skipped, with the reason."""
    mixers = ["gqa", "ngpt", "fused", "gdn", "mqa"]
    todo = [Cell(mixer, "torch", torch.float32, "tp") for mixer in mixers]
    *dealt, mqa = run(todo, CPU)
    assert [o.status for o in dealt] == ["passed"] * 4, dealt
    assert mqa.status == "skipped" and mqa.reasons == ("2 ranks can't share n_kv_heads=1",)
    todo = [Cell("gqa", "torch", torch.float32, prop) for prop in ("tp", "ulysses")]
    assert [o.reasons for o in run(todo, CPU, 3)] == [
        ("3 ranks can't share n_heads=4, n_kv_heads=2",),
        ("3 ranks can't share 4 heads",),
    ]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("prop", "unsuited"), [("tp_cp", ["mqa"]), ("hybrid", [])])
def test_four_ranks_share_in_two_ways(prop: str, unsuited: list[str]) -> None:
    todo = [c for c in cells(backends=["torch"], ranks=4) if c.prop == prop]
    todo = [c for c in todo if c.dtype == torch.float32]
    outcomes = list(run(todo, CPU, 4))
    assert outcomes and [o.cell.mixer for o in outcomes if o.status != "passed"] == unsuited


def test_cells_of_both_take_four_ranks() -> None:
    props = [{c.prop for c in cells(["fused"], ["torch"], ranks=n)} for n in (2, 3, 4, 5, 6)]
    for prop in ("tp_cp", "hybrid"):
        assert [prop in each for each in props] == [False, False, True, False, True]
    assert all("tp" in each for each in props)


def test_a_wrong_shard_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer of one process, with a row of another: as a lost message would leave it."""

    def answer(mixer: str, *args: Any, ranks: int) -> dict[str, Tensor]:
        assert ranks == 2
        whole = dict(Subject(MIXERS[mixer], probe_head_dim(CPU), CPU).truth(args[-1]))
        whole["dx"] = whole["dx"].clone()
        whole["dx"][0, 100] = whole["dx"][0, 3]
        return {name: x.float() for name, x in whole.items()}

    monkeypatch.setattr(properties, "sharded_answer", answer)
    for prop in ("zig_zag", "tp"):
        outcome = sharded_cell(prop)
        assert outcome.status == "failed" and outcome.tensor.startswith("dx (")


@pytest.mark.distributed
def test_an_error_on_a_rank_is_a_failed_cell(ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharded, "_on_a_rank", raises_on_a_rank)
    outcome = sharded_cell("ulysses")
    assert outcome.status == "failed"
    assert outcome.reasons == ("RuntimeError: rank 1 of 2: KeyError: 'gqa'",)
    monkeypatch.undo()
    assert sharded_cell("ulysses").status == "passed"


def raises_on_a_rank(rank: int, n: int, mixer: str, *args: Any) -> None:
    if rank == 1:
        raise KeyError(mixer)


def test_cells_come_from_the_capability_table() -> None:
    for name, c in CAPABILITIES.items():
        mine = cells(backends=[name])
        assert {x.dtype for x in mine} == set(c.dtypes)
        assert {x.prop for x in mine if x.mixer == KERNEL} == {str(f) for f in Feature}
        assert {x.mixer for x in mine if "gdn" in x.mixer} == (
            {"gdn", "gdn-plain"} if name == "torch" else set()
        )


def test_an_absent_backend_is_skipped_with_every_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("about machines without a GPU")
    todo = [Cell(KERNEL, "flash_3", torch.bfloat16, "dropout")]
    (outcome,) = run(todo, CPU)
    assert outcome.status == "skipped"
    assert len(outcome.reasons) == 3 and "no dropout" in outcome.reasons[-1]


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["fused"], ["fused", "fused-window"]),
        (["window", "kernel"], ["kernel", "window"]),
        (["normalized"], ["ngpt", "ngpt-window"]),
        (["gated_delta_net"], ["gdn", "gdn-plain"]),
    ],
)
def test_mixers_by_class_and_by_name(wanted: list[str], names: list[str]) -> None:
    assert mixer_names(wanted) == names


def test_an_unknown_mixer_is_named_with_the_choices() -> None:
    with pytest.raises(
        OLMoConfigurationError, match=r"no mixer 'nope'.*gated_delta_net.*window-70"
    ):
        mixer_names(["nope"])
