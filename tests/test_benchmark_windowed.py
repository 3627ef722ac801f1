"""`benchmarks/windowed.py`: both implementations of the windows, compiled for a TPU."""

import importlib.util
from pathlib import Path

import pytest

from kernels_pallas import aot

PATH = Path(__file__).parents[1] / "benchmarks" / "windowed.py"


@pytest.mark.slow
@pytest.mark.skipif(not aot.can_compile_for_tpu(), reason="libtpu is not installed")
def test_every_block_calls_its_kernel_only_where_pallas_is_asked_for(monkeypatch, capsys):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")  # the file takes it out on import
    spec = importlib.util.spec_from_file_location("benchmarks_windowed", PATH)
    windowed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(windowed)
    found = windowed.static(["swin_test"], 2, (16, 112, 112))
    blocks = 4
    for which, passes in (("forward", 1), ("gradient", 2)):
        xla, ours = (found[f"swin_test {which}"][i] for i in ("xla", "pallas_tpu"))
        assert (xla["kernels"], ours["kernels"]) == (0, passes * blocks)
        assert 0 < ours["hbm"] < xla["hbm"]
    assert capsys.readouterr().out.count("| swin_test | 2 |") == 2
