"""Flagship configs keep to the memory and the collectives that their budget files state."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest

from zoo.planning import budgets, plan

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs/budgets").glob("*.json"))
CASES = [(f, topology) for f in FILES for topology in json.loads(f.read_text())]
QUICK = ("vit_l16_imagenet", "v5e:16x16")
UNROLLED = ("swin_b_imagenet", "swin_l_imagenet", "dinat_l_imagenet")

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs"
)


def compiled(file, topology):
    (config,) = (ROOT / "configs").glob(f"*/{file.stem}.py")
    return plan.plan([str(config)], topology), json.loads(file.read_text())[topology]


def name(value):
    return value.stem if isinstance(value, Path) else value


def test_a_budget_is_kept_and_five_per_cent_or_a_new_collective_are_not():
    file = ROOT / f"configs/budgets/{QUICK[0]}.json"
    found, allowed = compiled(file, QUICK[1])
    assert budgets.over_budget(found, allowed) == []
    less = {**allowed, "hbm_bytes": int(found.hbm / 1.06)}
    assert "MiB a chip" in budgets.over_budget(found, less)[0]
    before = copy.deepcopy(allowed)
    largest = max(before["collective_bytes"], key=before["collective_bytes"].get)
    del before["collective_bytes"][largest]
    assert largest in budgets.over_budget(found, before)[0]


def marked():
    """All but the quick one; unrolled stages take a minute to compile, so only one is `slow`."""
    for file, topology in CASES:
        if (file.stem, topology) != QUICK:
            rare = file.stem in UNROLLED and (file.stem, topology) != (UNROLLED[0], "v5e:16x16")
            mark = pytest.mark.variants if rare else pytest.mark.slow
            yield pytest.param(file, topology, marks=mark)


@pytest.mark.parametrize(("file", "topology"), list(marked()), ids=name)
def test_every_budget_is_kept(file, topology):
    assert budgets.over_budget(*compiled(file, topology)) == []
