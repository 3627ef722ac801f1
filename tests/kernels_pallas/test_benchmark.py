"""The benchmark's rule from static figures to the dispatch table."""

import importlib.util
from pathlib import Path

PATH = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
SPEC = importlib.util.spec_from_file_location("benchmarks_kernels", PATH)
kernels = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kernels)

BF16 = "64 x 64, neighbourhoods of 7 x 7, 4 heads of 32"
FLOAT32 = BF16 + ", float32"


def rows(case, ours, xla="? / 1600 / 270"):
    return [
        f"| {case} | {which} | {chip} | 8 | {xla} | {ours} |  |"
        for which in ("forward", "both")
        for chip in kernels.CLOCK
    ]


def chosen(*table):
    return kernels.choices(list(table))["neighborhood_attention"]


def test_a_kernel_cheaper_than_the_traffic_of_xla_is_chosen_from_its_size_on():
    assert chosen(*rows(FLOAT32, "38 / 8 / 0"))["min_keys"] == 4096
    assert "0.05" in chosen(*rows(FLOAT32, "49 / 8 / 0"))["why"]


def test_a_kernel_that_costs_more_or_has_no_figure_is_not():
    assert chosen(*rows(FLOAT32, "3000 / 8 / 0"))["min_keys"] is None
    assert chosen(*rows(FLOAT32, "38 / 1700 / 0"))["min_keys"] is None
    assert chosen(*rows(FLOAT32, "? / 8 / 0"))["min_keys"] is None
    assert (
        chosen(*rows(FLOAT32, "38 / 8 / 0")[:3], *rows(FLOAT32, "? / 8 / 0")[3:])["min_keys"]
        is None
    )


def test_new_rows_replace_old_ones_of_the_same_case():
    old, new = rows(FLOAT32, "1 / 1 / 0"), rows(BF16, "2 / 2 / 0")
    table = kernels.merged([*old, *new], rows(FLOAT32, "3 / 3 / 0"))
    assert table == [*new, *rows(FLOAT32, "3 / 3 / 0")]
