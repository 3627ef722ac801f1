"""`zoo plan`: several slices, the smallest one, the optimizer's state in the hosts' memory."""

import dataclasses
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from zoo.errors import PartitionError
from zoo.planning import plan, report, search
from zoo.planning.chips import CHIPS, GIB, NoPlan, find_chip
from zoo.training import Partition
from zoo.training.partition import make_mesh

TINY = str(Path(__file__).parents[1] / "training" / "tiny.py")
libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs"
)


@libtpu
def test_between_two_slices_run_the_sums_of_gradients_and_nothing_is_gathered():
    found = plan.plan([TINY, "--partition.fsdp=4"], "v5e:2x2", slices=2)
    assert (found.chips, found.partition["data"], found.partition["fsdp"]) == (8, 2, 4)
    between = [row for row in found.collectives if row.kind.endswith("between slices")]
    within = [row for row in found.collectives if row not in between]
    assert {(row.kind, row.group) for row in between} == {("all-reduce between slices", 2)}
    assert ("all-gather", "parameters", 4) in {(r.kind, r.what, r.group) for r in within}
    sums = sum(row.bytes for row in between if row.what == "parameters")
    assert sums > 0.9 * sum(row.bytes for row in between)
    assert "2 slices of v5e:2x2" in report.readable(found)


def test_slices_that_no_axis_can_span_are_refused():
    devices = [SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    with pytest.raises(PartitionError, match=r"data \* fsdp = 1 \* 1 cannot be cut"):
        make_mesh(Partition(tensor=8), devices)


@libtpu
def test_offload_frees_the_optimizer_state_but_for_what_is_visiting():
    deep = [TINY, *(f"--model.overrides.{f}" for f in ("depth=8", "width=256", "hidden=8192"))]
    kept = plan.plan(deep, "v5e:1x1")
    moved = plan.plan([*deep, "--partition.offload=optimizer"], "v5e:1x1")
    state = kept.holds["optimizer state"]
    assert moved.host["optimizer state"] > 0.99 * state > 2**27
    assert moved.hbm < kept.hbm - 0.6 * state


@pytest.fixture
def planned(monkeypatch):
    """Plans of a state of 100 GiB and 2 GiB of activations, whatever the config."""
    asked = []

    def fake(args, topology, slices=1):
        fields = dict(a.removeprefix("--partition.").split("=") for a in args[1:])
        chips = math.prod(map(int, topology.partition(":")[2].split("x"))) * slices
        fsdp = int(fields["fsdp"])
        asked.append((topology, fsdp))
        chip = find_chip(topology)
        holds = {"parameters": int(100 * GIB / fsdp)}
        holds["activations and temporaries"] = 2 * GIB
        hbm, usable = sum(holds.values()), int(chip.usable * GIB)
        return plan.Plan("fake", topology, slices, chips, {"fsdp": fsdp}, holds, {}, hbm, usable,
                         hbm <= usable, (), 1.0, 1.0, 0.0, "")  # fmt: skip

    monkeypatch.setattr(search, "plan", fake)
    return asked


def test_the_smallest_slice_is_the_first_that_fits_with_as_many_copies_as_have_room(planned):
    found, fields = search.smallest(["config.py"], "v5e")
    assert (found.topology, found.chips) == ("v5e:2x4", 8)
    assert planned[:3] == [("v5e:1x1", 1), ("v5e:2x2", 4), ("v5e:2x4", 8)]
    assert fields == ["--partition.data=1", "--partition.fsdp=8"]
    found, fields = search.smallest(["config.py"], "v5e", slices=4)
    assert (found.topology, found.chips) == ("v5e:2x2", 16)
    assert fields == ["--partition.data=-1", "--partition.fsdp=8"]


def test_what_fits_no_slice_is_said_with_what_it_would_need(planned, monkeypatch):
    chip = dataclasses.replace(CHIPS["v5e"], slices=("1x1", "2x2"))
    monkeypatch.setitem(CHIPS, "v5e", chip)
    monkeypatch.setattr(search, "proposal", lambda args, failed: None)
    with pytest.raises(NoPlan, match=r"no slice up to v5e:2x2: .* 27.00 of 15.75 GiB there"):
        search.smallest(["config.py"], "v5e")


@libtpu
@pytest.mark.slow
def test_the_smallest_slice_of_a_program_that_does_not_fit_one_chip():
    wide = [TINY, "--model.overrides.width=4096", "--model.overrides.hidden=131072"]
    found, _ = search.smallest(wide, "v5e")
    assert found.topology == "v5e:2x2"
    assert found.fits
