"""Meshes on TPU slices, as libtpu describes them: any sizes that divide fit any slice."""

import importlib.util
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from zoo.errors import PartitionError
from zoo.training import Partition
from zoo.training.mesh import arrange
from zoo.training.partition import AXES, make_mesh

libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu describes slices"
)
SLICES = (
    *("v2:2x2", "v3:4x4", "v4:2x2x1", "v4:2x2x2", "v4:4x4x4", "tpu7x:2x2x1", "tpu7x:2x2x4"),
    *(
        f"v5e:{s}"
        for s in ("1x1", "2x2", "2x4", "4x2", "1x8", "4x4", "4x8", "8x8", "8x16", "16x16")
    ),
    *(f"v6e:{s}" for s in ("2x4", "4x8", "8x8", "4x12")),
    *(f"v5p:{s}" for s in ("2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "2x2x3", "4x8x8")),
)
LARGE = ("v3:16x16", "v4:8x8x8", "v5p:4x4x28", "v5p:4x8x12")


def described(topology, slices=1):
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    if topology.endswith(":1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return list(found.devices)


def factorisations(number, parts=4):
    if parts == 1:
        yield (number,)
        return
    for size in range(1, number + 1):
        if number % size == 0:
            for rest in factorisations(number // size, parts - 1):
                yield (size, *rest)


def partition(sizes):
    return Partition(**dict(zip(AXES, sizes, strict=True)))


def rows_by_process(grid):
    """Rows of a batch cut over data and fsdp, by the process that holds them."""
    rows = {}
    for row, devices in enumerate(grid.reshape(math.prod(grid.shape[:2]), -1)):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    return rows


def every_mesh_is_built(topology):
    devices = described(topology)
    for sizes in factorisations(len(devices)):
        mesh = make_mesh(partition(sizes), devices)
        assert mesh.devices.shape == sizes and mesh.axis_names == AXES
        assert len({d.id for d in mesh.devices.flat}) == len(devices)


@libtpu
@pytest.mark.parametrize("topology", SLICES)
def test_every_factorisation_builds_a_mesh(topology):
    every_mesh_is_built(topology)


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize("topology", LARGE)
def test_every_factorisation_builds_a_mesh_of_a_large_slice(topology):
    every_mesh_is_built(topology)


@libtpu
def test_what_remains_is_taken_by_any_axis():
    devices = described("v6e:4x8")
    for axis in AXES:
        mesh = make_mesh(Partition(**{name: 2 for name in AXES} | {axis: -1}), devices)
        assert mesh.size == 32 and mesh.shape[axis] == 4


@libtpu
@pytest.mark.parametrize("topology", ["v5e:16x16", "v6e:4x8", "v5p:4x4x12", "v5e:4x12", "v3:4x4"])
def test_a_host_holds_one_part_of_the_batch(topology):
    devices = described(topology)
    for sizes in factorisations(len(devices)):
        for rows in rows_by_process(arrange(sizes, devices)).values():
            assert max(rows) - min(rows) + 1 == len(rows) and min(rows) % len(rows) == 0, sizes


@libtpu
def test_the_innermost_axis_has_the_innermost_links():
    cores = arrange((1, 8, 2, 1), described("v3:2x4"))
    assert all(a.coords == b.coords for a, b in cores.reshape(8, 2))
    hosts = arrange((2, 4, 1, 4), described("v6e:4x8"))
    for group in hosts.reshape(-1, 4):
        assert len({d.process_index for d in group}) == 1
    squares = arrange((2, 1, 16, 1), described("v6e:4x8"))
    for group in squares[:, 0, :, 0]:
        places = np.array([d.coords for d in group])
        assert list(np.ptp(places, axis=0) + 1) == [4, 4, 1]


@libtpu
def test_data_and_then_fsdp_run_between_slices():
    devices = described("v5e:2x2", slices=4)
    for sizes, within in (((4, 4, 1, 1), (1, 4)), ((2, 4, 2, 1), (1, 2)), ((1, 8, 1, 2), (1, 2))):
        grid = make_mesh(partition(sizes), devices).devices
        of = np.vectorize(lambda d: d.slice_index)(grid)
        blocks = of.reshape(sizes[0] // within[0], within[0], sizes[1] // within[1], within[1], -1)
        assert not np.ptp(blocks, axis=(1, 3, 4)).any() and len(set(of.flat)) == 4
    with pytest.raises(PartitionError, match=r"4 slices, but data \* fsdp = 2 \* 1 cannot be cut"):
        make_mesh(Partition(data=2, tensor=8), devices)


def chips(*places, **more):
    return [SimpleNamespace(platform="tpu", coords=p, core_on_chip=0, **more) for p in places]


def test_devices_that_fill_no_box_keep_their_order():
    corner = chips((0, 0, 0), (1, 0, 0), (0, 1, 0), (5, 5, 0))
    assert list(arrange((2, 2, 1, 1), corner).flat) == corner
    assert list(arrange((1, 8, 1, 1), jax.devices()[:1] * 8).flat) == jax.devices()[:1] * 8


def test_a_box_need_not_start_at_the_origin():
    part = chips((4, 2, 0), (5, 2, 0), (4, 3, 0), (5, 3, 0), process_index=7)
    assert [d.coords for d in arrange((1, 2, 2, 1), part)[0, 0, :, 0]] == [(4, 2, 0), (5, 2, 0)]


def test_slices_of_unlike_sizes_are_refused():
    devices = [SimpleNamespace(platform="tpu", slice_index=int(i > 2)) for i in range(8)]
    with pytest.raises(PartitionError, match="3 and 5 devices; a mesh needs slices of one size"):
        make_mesh(Partition(), devices)
