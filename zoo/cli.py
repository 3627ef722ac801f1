"""The command line: `zoo list | show | convert | verify | plan`, also as `python -m zoo.cli`.

    zoo list "swin*"                                    names, parameters, FLOPs, source, licence
    zoo show minilm_l6_v2                               everything known of one variant
    zoo convert bert_base_uncased OLD.bin NEW.safetensors --layout huggingface
    zoo verify swin_test                                counts, checkpoint rules, goldens, gradients
    zoo plan configs/vision/vit_l16_imagenet.py --topology v5e:16x16    the train step on a TPU pod

Tables are drawn on a terminal and are plain columns in a pipe; `--json` gives the same facts to
programs. The exit status is 0; 1 where a check of `verify` failed; 2 for a request that cannot be
served, with one message on standard error.
"""

import argparse
import ast
import dataclasses
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import zoo
from zoo import registry

if TYPE_CHECKING:
    import flax.linen as nn

Rows = list[dict[str, Any]]


class RequestError(ValueError):
    """A request that cannot be served; the message is for the person who made it."""


class _Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message[:1].upper()}{message[1:]}; see {self.prog} --help.")


# ----------------------------------------------------------------------------------- list


def list_variants(pattern: str, task: str | None) -> Rows:
    """One row a variant whose name matches.

    Raises:
      RequestError: if there is none.
    """
    names = zoo.list_models(pattern, task)
    if not names:
        of = f" of task {task!r}" if task else ""
        tasks = sorted({zoo.info(name).task for name in zoo.list_models()})
        raise RequestError(
            f"No model matches {pattern!r}{of}; zoo list shows all, and tasks are "
            f"{', '.join(tasks)}."
        )
    rows = []
    for name in names:
        variant = zoo.info(name)
        rows.append(
            {
                "name": name,
                "task": variant.task,
                "parameters": variant.params,
                "flops": variant.flops,
                "input": input_shapes(variant.create()),
                "source": variant.code,
                "licence": variant.licence,
            }
        )
    return rows


def input_shapes(model: "nn.Module") -> dict[str, list[int]]:
    """The model's arguments and their shapes for a batch of one."""
    return {name: list(spec.shape) for name, spec in model.example_inputs().items()}


# ----------------------------------------------------------------------------------- show


def describe(name: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """All that is known of a variant, and what its shapes say, without computing anything."""
    variant = zoo.info(name)
    model = zoo.create(name, **overrides)
    variables, features = shapes(model)
    system = registry.system(model)
    return {
        "name": name,
        "task": variant.task,
        "module": f"{registry.file_of(name)}.{type(model).__name__}",
        "parameters": count(variables),
        "published parameters": variant.params,
        "flops": variant.flops,
        "metric": variant.metric,
        "paper": variant.paper,
        "source": variant.code,
        "licence": variant.licence,
        "files": {file.name: file.sha256 for file in variant.files},
        "layouts": list(system.layouts),
        "preprocessing": variant.preprocessing and dataclasses.asdict(variant.preprocessing),
        "input": input_shapes(model),
        "fields": {
            f.name: _readable(getattr(model, f.name))
            for f in dataclasses.fields(model)
            if f.name not in ("parent", "name")
        },
        "features": features,
    }


def shapes(model: "nn.Module") -> tuple[Any, dict[str, Any]]:
    """Variables as shapes, and the shape of every feature for a batch of one."""
    import jax
    import jax.numpy as jnp

    order = []  # JAX sorts the keys of a dict

    def run() -> tuple[Any, Any]:
        inputs = {k: jnp.zeros(s.shape, s.dtype) for k, s in model.example_inputs().items()}
        features, variables = model.init_with_output(jax.random.key(0), **inputs, method="features")
        order.extend(features)
        return variables, features

    variables, features = jax.eval_shape(run)
    sizes = jax.tree.map(lambda leaf: list(leaf.shape), dict(features))
    return variables, {name: sizes[name] for name in order}


def count(variables: Mapping[str, Any]) -> int:
    """How many parameters there are."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def _readable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_readable(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _readable(v) for k, v in value.items()}
    return getattr(value, "__name__", str(value))


# -------------------------------------------------------------------------------- convert


def convert(
    name: str,
    source: str,
    out: str,
    layout: str | None,
    adapt: bool,
    overrides: Mapping[str, Any],
) -> dict[str, Any]:
    """A checkpoint as a safetensors file of a published layout, or as an Orbax directory.

    Raises:
      RequestError: if `out` is neither, or `layout` has no place for the model.
    """
    target = Path(out)
    as_file = target.suffix == ".safetensors"
    if not as_file and target.suffix:
        raise RequestError(
            f"{out!r} is no name to write to: end it in .safetensors, or give a directory "
            "without a suffix for an Orbax checkpoint."
        )
    if not as_file and layout is not None:
        raise RequestError("A layout is for a .safetensors file; an Orbax directory has our names.")
    if as_file and target.is_dir():
        raise RequestError(f"{out!r} is a directory; give the name of a file.")
    if not as_file and target.exists():
        raise RequestError(f"{out!r} exists already; give the name of a new directory.")
    layouts = list(registry.system(name).layouts)
    if layout is not None and layout not in layouts:
        raise RequestError(f"{name} has no layout {layout!r}; it has {', '.join(layouts)}.")
    model, variables = zoo.load(name, source, adapt=adapt, **overrides)
    target.parent.mkdir(parents=True, exist_ok=True)
    if as_file:
        from zoo.checkpoints import files

        state = zoo.export(model, variables, layout)
        files.save_safetensors(target, state, metadata={"format": "pt"})
        written = len(state)
    else:
        written = _save_orbax(target, model, variables)
    return {"name": name, "written": str(target), "tensors": written}


def _save_orbax(target: Path, model: "nn.Module", variables: Mapping[str, Any]) -> int:
    """A run directory with one checkpoint, moved into place when it is whole."""
    import jax

    from zoo.checkpoints.runs import Checkpoints

    collections = {name: tree for name, tree in variables.items() if name != "params"}
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        run = Path(folder) / "run"
        checkpoints = Checkpoints(run)
        try:
            parts = {"params": variables["params"], "collections": collections}
            checkpoints.save(0, parts, extra={"module": type(model).__name__})
        finally:
            checkpoints.close()
        run.rename(target)
    return len(jax.tree.leaves(variables))


# --------------------------------------------------------------------------------- verify


@dataclasses.dataclass(frozen=True)
class Check:
    """One check of `verify`: `passed` is None where there was nothing to check."""

    check: str
    passed: bool | None
    detail: str


def verify(name: str, overrides: Mapping[str, Any], weights: str | None = None) -> Iterator[Check]:
    """Runs a system's checks on one variant, cheapest first."""
    model = zoo.create(name, **overrides)
    variables, _ = shapes(model)
    published = None if overrides else zoo.info(name).params
    counted = count(variables)
    yield Check(
        "parameters",
        None if published is None else counted == published,
        f"{counted:,}" + (f", published {published:,}" if published else ", no published number"),
    )
    filled = fill(variables)
    yield from check_layouts(model, filled)
    yield check_gradient(model, filled)
    del filled
    yield from check_goldens(model, weights)


def fill(variables: Any) -> Any:
    """Numbers of ordinary size for every leaf: all differ, unlike at initialisation."""
    import jax
    import numpy as np

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(
            rng.standard_normal(leaf.shape, np.float32) * 0.05 + 0.01, leaf.dtype
        ),
        variables,
    )


def check_layouts(model: "nn.Module", variables: Any) -> Iterator[Check]:
    """Every published layout that has a place for all of the model, there and back."""
    import jax
    import numpy as np

    layouts = registry.system(model).layouts
    written = 0
    for layout in layouts:
        try:
            state = zoo.export(model, variables, layout)
        except ValueError:  # this layout is for models with other parts
            continue
        written += 1
        try:
            back = zoo.convert(model, state)
        except ValueError as error:
            yield Check(f"layout {layout}", False, str(error))
            continue
        pairs = zip(jax.tree.leaves(variables), jax.tree.leaves(back), strict=True)
        differ = sum(np.asarray(a).tobytes() != np.asarray(b).tobytes() for a, b in pairs)
        again = zoo.export(model, back, layout)
        differ += sum(
            np.ascontiguousarray(state[k]).tobytes() != np.ascontiguousarray(again[k]).tobytes()
            for k in state
        )
        detail = f"{len(state)} tensors, there and back" + (
            f": {differ} differ" if differ else " bit for bit"
        )
        yield Check(f"layout {layout}", not differ, detail)
    if not written:
        yield Check("layouts", False, f"none of {', '.join(layouts)} has a place for all leaves")


def check_gradient(model: "nn.Module", variables: Any) -> Check:
    """Forward and backward give finite numbers."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)

    def example(spec: jax.ShapeDtypeStruct) -> jax.Array:
        if spec.dtype == jnp.bool_:
            return jnp.ones(spec.shape, spec.dtype)
        if jnp.issubdtype(spec.dtype, jnp.integer):  # 0 and 1 are in every table
            return jnp.asarray(rng.integers(0, 2, spec.shape), spec.dtype)
        return jnp.asarray(rng.standard_normal(spec.shape), spec.dtype)

    inputs = {k: example(s) for k, s in model.example_inputs().items()}
    if "mask" in inputs:
        inputs["mask"] = jnp.ones_like(inputs["mask"])
    rest = {k: v for k, v in variables.items() if k != "params"}

    @jax.jit
    def largest(params: Any) -> tuple[jax.Array, jax.Array]:
        def loss(params: Any) -> jax.Array:
            outputs = model.apply({"params": params, **rest}, **inputs)
            return sum(jnp.sin(x.astype(jnp.float32)).mean() for x in jax.tree.leaves(outputs))

        value, grads = jax.value_and_grad(loss)(params)
        return value, jnp.stack([jnp.abs(g).max() for g in jax.tree.leaves(grads)])

    value, maxima = jax.device_get(largest(variables["params"]))
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(variables["params"])]
    broken = [p for p, m in zip(paths, maxima, strict=True) if not np.isfinite(m)]
    if not np.isfinite(value):
        return Check("gradient", False, f"the outputs are not finite ({value})")
    if broken:
        return Check("gradient", False, f"not finite in {', '.join(broken[:4])}")
    if not maxima.any():
        return Check("gradient", False, "zero everywhere")
    return Check("gradient", True, f"finite in all {len(maxima)} leaves")


def check_goldens(model: "nn.Module", weights: str | None) -> Iterator[Check]:
    """Every reference case of the system, where the tests stand beside the package."""
    program, cases = reference_cases(model)
    if not cases:
        yield Check("goldens", None, "there are no reference cases beside the package")
        return
    golden = _load_module("golden", program)
    for case in cases:
        name = f"golden {case.parent.name}/{case.stem}"
        try:
            report = golden.check(case, weights)
        except golden.NoWeights as error:
            yield Check(name, None, str(error))
        except ValueError as error:
            yield Check(name, False, str(error))
        else:
            yield Check(name, report.passed, f"largest relative error {report.worst:.1e}")


def reference_cases(model: "nn.Module") -> tuple[Path, list[Path]]:
    """The program that compares, and the golden files of the model's system."""
    system = type(model).__module__.rpartition(".")[2]
    tests = Path(zoo.__file__).parent.parent / "tests"
    program = tests / "golden.py"
    return program, sorted((tests / "golden" / system).glob("*.npz")) if program.exists() else []


def _load_module(name: str, path: Path) -> Any:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --------------------------------------------------------------------------------- output


def _quantity(value: float | None, unit: str = "") -> str:
    """A number in thousands (K), millions (M) or thousands of millions (G)."""
    if value is None:
        return ""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.4g} {letter}{unit}"
    return f"{value:g}"


def _one_line(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return "; ".join(f"{k}: {_one_line(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_one_line(v) for v in value)
    return f"{value:,}" if type(value) is int else str(value)


def _shape(sizes: Any) -> str:
    """A shape as `1x224x224x3`; outputs that are tuples of arrays, one after the other."""
    if sizes and all(isinstance(size, int) for size in sizes):
        return "x".join(map(str, sizes))
    return ", ".join(map(_shape, sizes))


def print_table(rows: Sequence[Mapping[str, str]], numbers: Sequence[str] = ()) -> None:
    """Rows with the same keys, as a table on a terminal and as plain columns elsewhere.

    Columns named in `numbers` are set to the right; names of blanks are not shown.
    """
    columns = list(rows[0])
    headed = any(column.strip() for column in columns)
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(header_style="bold", box=None, pad_edge=False, show_header=headed)
        for i, column in enumerate(columns):
            side = "right" if column in numbers else "left"
            table.add_column(column, justify=side, no_wrap=i == 0, overflow="fold")
        for row in rows:
            table.add_row(*(_escaped(row[column]) for column in columns))
        Console().print(table)
        return
    widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    for row in (*([{c: c for c in columns}] * headed), *rows):
        cells = (
            row[c].rjust(widths[c]) if c in numbers else row[c].ljust(widths[c]) for c in columns
        )
        print("  ".join(cells).rstrip())


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _run_list(options: argparse.Namespace) -> int:
    rows = list_variants(options.pattern, options.task)
    if options.json:
        _print_json(rows)
        return 0
    print_table(
        [
            {
                "name": row["name"],
                "task": row["task"],
                "parameters": _quantity(row["parameters"]),
                "FLOPs": _quantity(row["flops"]),
                "input": _shape(next(iter(row["input"].values()))[1:]),
                "source": row["source"],
                "licence": row["licence"],
            }
            for row in rows
        ],
        numbers=("parameters", "FLOPs"),
    )
    return 0


def _run_show(options: argparse.Namespace) -> int:
    facts = describe(options.name, _overrides(options.set))
    if options.json:
        _print_json(facts)
        return 0
    facts["flops"] = _quantity(facts["flops"], " multiply-adds of one example").strip()
    facts["files"] = [
        name + (f" (sha256 {digest})" if digest else "") for name, digest in facts["files"].items()
    ]
    facts["input"] = {name: _shape(shape) for name, shape in facts["input"].items()}
    features = facts.pop("features")
    rows = [{"": key, " ": _one_line(value)} for key, value in facts.items() if value]
    rows += [{"": f"feature {key}", " ": _shape(shape)} for key, shape in features.items()]
    print_table(rows)
    return 0


def _run_convert(options: argparse.Namespace) -> int:
    done = convert(
        options.name,
        options.source,
        options.out,
        options.layout,
        options.adapt,
        _overrides(options.set),
    )
    if options.json:
        _print_json(done)
    else:
        print(f"{done['written']}: {done['tensors']} tensors of {done['name']}")
    return 0


def _run_verify(options: argparse.Namespace) -> int:
    words = {True: "ok", False: "FAILED", None: "skipped"}
    checks = []
    for check in verify(options.name, _overrides(options.set), options.weights):
        checks.append(check)
        if not options.json:
            print(f"{words[check.passed]:8} {check.check:34} {check.detail}", flush=True)
    failed = [check.check for check in checks if check.passed is False]
    if options.json:
        _print_json([dataclasses.asdict(check) for check in checks])
    elif failed:
        print(f"{options.name}: {len(failed)} of {len(checks)} checks failed")
    return 1 if failed else 0


# ----------------------------------------------------------------------------------- plan


def _run_plan(options: argparse.Namespace) -> int:
    from zoo.training import plan

    changes = [f"partition.{change}" for change in options.partition] + options.set
    args = [options.config, *(f"--{change}" for change in changes)]
    if options.smallest:
        found, fields = plan.smallest(args, options.topology, options.slices)
    else:
        found, fields = plan.plan(args, options.topology, options.slices), []
    if options.write_budget:
        print(plan.write_budget(found))
    if options.json:
        _print_json(dataclasses.asdict(found))
    else:
        print(plan.readable(found, options.full))
        if options.smallest:
            chips = f"{found.topology}, {found.chips} chips"
            print(f"The smallest that it fits: {chips}, with {' '.join(fields)}")
    if found.fits:
        return 0
    needed = f"{found.hbm / 2**30:.2f} of {found.usable / 2**30:.2f} GiB"
    better = plan.proposal_text(args, found)
    raise RequestError(f"A chip of {found.topology} would need {needed}: {better}.")


# -------------------------------------------------------------------------------- program


def _overrides(assignments: Sequence[str]) -> dict[str, Any]:
    """`["num_classes=10", "image_size=(32, 48)"]` -> fields; what is no Python literal is text."""
    fields = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise RequestError(f"--set takes FIELD=VALUE, not {assignment!r}.")
        try:
            fields[key.strip().replace("-", "_")] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            words = {"true": True, "false": False, "none": None}
            fields[key.strip().replace("-", "_")] = words.get(text.strip().lower(), text.strip())
    return fields


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="zoo", description="Published transformer systems in JAX.")
    parser.add_argument("--version", action="version", version=f"zoo {zoo.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> _Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON")
        return sub

    def fields(sub: _Parser) -> None:
        sub.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="FIELD=VALUE",
            help="replace a field of the model, e.g. num_classes=10; may be repeated",
        )

    sub = command("list", _run_list, "The models that there are.")
    sub.add_argument("pattern", nargs="?", default="*", help="wildcard, e.g. 'swin*' (default: *)")
    sub.add_argument("--task", help="only models for this, e.g. image_classification")

    sub = command("show", _run_show, "All that is known of a model, with its shapes.")
    sub.add_argument("name", help="a name that zoo list shows")
    fields(sub)

    sub = command("convert", _run_convert, "Rewrite a checkpoint in another published layout.")
    sub.add_argument("name", help="the model that the checkpoint is of")
    sub.add_argument("source", help="file, Hugging Face directory, Orbax directory or hub id")
    sub.add_argument("out", help="NAME.safetensors, or a new directory for an Orbax checkpoint")
    sub.add_argument("--layout", help="naming of the .safetensors file; default the official one")
    sub.add_argument(
        "--adapt", action="store_true", help="resize tables and start heads afresh where needed"
    )
    fields(sub)

    sub = command("verify", _run_verify, "Check a model: counts, rules, gradients, goldens.")
    sub.add_argument("name", help="a name that zoo list shows")
    sub.add_argument("--weights", help="trained weights for reference cases that need them")
    fields(sub)

    sub = command("plan", _run_plan, "Compile a config's train step for a TPU slice, without one.")
    sub.add_argument("config", help="a config file")
    sub.add_argument(
        "--topology",
        required=True,
        metavar="CHIP:SHAPE",
        help="v5e:16x16, v5p:4x4x4, v4:..., v6e:...",
    )
    sub.add_argument("--slices", type=int, default=1, help="slices of that topology (default: 1)")
    sub.add_argument(
        "--partition", nargs="+", default=[], metavar="AXIS=SIZE", help="as fsdp=256 remat=full"
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="replace a field of the config, e.g. data.batch_size=1024; may be repeated",
    )
    sub.add_argument(
        "--smallest", action="store_true", help="find the smallest slice of the chip that it fits"
    )
    sub.add_argument("--full", action="store_true", help="list every collective, with its source")
    sub.add_argument(
        "--write-budget", action="store_true", help="keep the figures in configs/budgets"
    )
    return parser


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename!r}" if error.filename else ""
        return f"Cannot read or write{where}: {error.strerror.lower()}."
    return str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except BrokenPipeError:  # the reader of our output has gone, as in `zoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"zoo: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("zoo: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
