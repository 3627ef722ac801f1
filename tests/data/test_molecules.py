import numpy as np
import pytest

from zoo.data.molecules import EDGE_NUMBERS, NODE_NUMBERS, Solubility, read_sdf

ETHANOL = """ethanol
     drawn

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    1.3000    0.7500    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    2.6000    0.0000    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0
  2  3  1  0
M  END
>  <SOL>  (1)
1.1

>  <SOL_classification>  (1)
(C) high

$$$$
"""
CARBON_DIOXIDE = """gas
     drawn

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
    1.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    2.0000    0.0000    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  2  0
  2  3  2  0
M  END
>  <SOL_classification>  (2)
(B) medium

$$$$
"""


@pytest.fixture
def folder(tmp_path):
    text = ETHANOL + CARBON_DIOXIDE
    (tmp_path / "solubility.train.sdf").write_bytes(text.replace("\n", "\r\n").encode())
    return tmp_path


def test_atoms_bonds_and_properties_are_read(folder):
    ethanol, gas = read_sdf(folder / "solubility.train.sdf")
    assert ethanol.symbols == ("C", "C", "O") and ethanol.properties["SOL"] == "1.1"
    np.testing.assert_array_equal(ethanol.graph.nodes, [[0, 1], [0, 2], [2, 1]])
    np.testing.assert_array_equal(ethanol.graph.edges, [[0, 1, 1, 2], [1, 0, 2, 1]])
    assert set(gas.graph.edge_features[:, 0]) == {2}
    (folder / "bad.sdf").write_text(ETHANOL.replace("  2  3  1  0", "  2  9  1  0"))
    with pytest.raises(ValueError, match=r"Record 0 of bad\.sdf .* ends at atom 9 of 3"):
        read_sdf(folder / "bad.sdf")


def test_examples_are_padded_and_within_their_numbers(folder):
    source = Solubility("train", walk_steps=4, max_nodes=5, folder=str(folder))
    example = source[0]
    assert len(source) == 2 and int(example["labels"]) == 2 and int(source[1]["labels"]) == 1
    assert example["nodes"].shape == (5, 2) and not example["nodes"][3:].any()
    assert (example["edges"][4:] == 5).all() and (example["edges"][:4] < 3).all()
    assert (example["nodes"].max(0) < NODE_NUMBERS).all()
    assert example["edge_features"].max() < EDGE_NUMBERS[0]
    np.testing.assert_allclose(example["walks"][:3, 1], [0.5, 1.0, 0.5])
    assert len(Solubility("train", max_nodes=2, folder=str(folder))) == 0
