"""Where the values of a compiled step come from and where they go: parameters or activations?

Shapes do not tell: a reshaped kernel looks like a piece of the batch and the other way round. The
program does. It is a graph of values (each array of a tuple one of its own, through fusions, calls
and around loops), and of what a collective moves

    it is of the parameters, if neither the batch nor chance had a part in it (a kernel on its way
    to the chips that need it), or if what it gives ends in the next state and no product is made
    with it on the way there or elsewhere (a gradient, or a parameter that was updated);
    it is an activation in every other case.

A gathered activation may end in the state without a product, too: summed over its positions it is
the gradient of a bias. So for what is gathered, not summed, no path may sum over an axis.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Set
from typing import Any

Value = tuple[str, str, int]  # computation, instruction, which array of its tuple

STATE = re.compile(r"^state\.(params|frozen|opt_state|ema|collections)\b")
"""Arguments of the step that are parameters or made from them; all others count as the batch."""

REDUCTIONS = ("all-reduce", "reduce-scatter")
_PRODUCTS = {"dot", "convolution", "ragged-dot"}
_SUMS = {"reduce", "reduce-window", "scatter"}
_KERNELS = re.compile(r'custom_call_target="[^"]*(?:custom_call|gemm|matmul|conv|dot|attention)')
_ONE_TO_ONE = {*REDUCTIONS, "all-gather", "collective-permute", "opt-barrier", "copy"}


class Flow:
    """The values of a module, and what becomes of them."""

    def __init__(self, computations: dict[str, Any], header: str) -> None:
        """Follow every value.

        Args:
          computations: as `zoo.planning.hlo.parse` gives them.
          header: the first line of the module's text, which says what arguments are given back.
        """
        self.computations = computations
        self._next: dict[Value, list[Value]] = defaultdict(list)
        self._before: dict[Value, list[Value]] = defaultdict(list)
        self._products: set[Value] = set()
        self._summed: set[tuple[Value, Value]] = set()
        self._sent: dict[str, list[Value]] = defaultdict(list)
        self._received: dict[str, list[Value]] = defaultdict(list)
        entry = next(c for c in computations.values() if c.entry)
        for computation in computations.values():
            for i in computation.instructions.values():
                self._connect(computation, i)
        for message, sent in self._sent.items():
            self._mix(sent, self._received[message])
        state, others = self._arguments(entry)
        kept = [
            (entry.name, entry.root.name, int(place))
            for place, argument in re.findall(r"\{(\d+)\}: \((\d+), \{\}", header)
            if int(argument) in state
        ]
        self._tainted = _closure(others, self._next)
        self._multiplied = _closure(self._products, self._before)
        self._kept = _closure(kept, self._before, self._products)
        self._kept_whole = _closure(kept, self._before, self._products, self._summed)

    def of_parameters(self, computation: str, i: Any, operand: int, kind: str) -> bool:
        """Whether an operand of a collective is of the parameters."""
        name = i.operands[operand]
        given = self._leaves(self.computations[computation].instructions[name])
        if not any((computation, name, leaf) in self._tainted for leaf in range(given)):
            return True
        leaves = self._leaves(i)
        same = leaves == len(i.operands)
        results = [(computation, i.name, leaf) for leaf in ([operand] if same else range(leaves))]
        if message := _message(i):
            results = self._received[message]
        kept = self._kept if kind.startswith(REDUCTIONS) else self._kept_whole
        return any(r in kept for r in results) and not any(r in self._multiplied for r in results)

    # ------------------------------------------------------------------------ the graph

    def _leaves(self, i: Any) -> int:
        return len(i.shapes)

    def _arguments(self, entry: Any) -> tuple[set[int], list[Value]]:
        """Numbers of the arguments that are the state, and the values of the others."""
        state, others = set(), []
        for i in entry.instructions.values():
            if i.opcode != "parameter":
                continue
            name = re.search(r'op_name="([^"]*)"', i.text)
            if name and STATE.match(name.group(1)):
                state.add(_number(i))
            else:
                others += [(entry.name, i.name, leaf) for leaf in range(self._leaves(i))]
        return state, others

    def _edge(self, source: Value, target: Value) -> None:
        self._next[source].append(target)
        self._before[target].append(source)

    def _edges(self, sources: Iterable[Value], targets: Iterable[Value]) -> None:
        """One to one where there are as many, else all to all."""
        sources, targets = list(sources), list(targets)
        if len(sources) == len(targets):
            for source, target in zip(sources, targets, strict=True):
                self._edge(source, target)
        else:
            self._mix(sources, targets)

    def _mix(self, sources: Iterable[Value], targets: list[Value]) -> None:
        for source in sources:
            for target in targets:
                self._edge(source, target)

    def _values(self, computation: Any, name: str) -> list[Value]:
        i = computation.instructions[name]
        return [(computation.name, name, leaf) for leaf in range(self._leaves(i))]

    def _connect(self, computation: Any, i: Any) -> None:
        """Draw the edges into an instruction, and into what it calls."""
        results = self._values(computation, i.name)
        given = [self._values(computation, name) for name in i.operands]
        flat = [value for values in given for value in values]
        inner = [self.computations[name] for name in i.called if name in self.computations]
        if i.opcode == "while":
            names = dict(re.findall(r"(condition|body)=%?([\w.\-]+)", i.text))
            body = self.computations[names["body"]]
            root = self._values(body, body.root.name)
            for called in inner:
                for argument in _parameters(called):
                    self._edges(flat, self._values(called, argument.name))
                    self._edges(root, self._values(called, argument.name))
            self._edges(root, results)
        elif i.opcode == "conditional":
            for values, branch in zip(given[1:], inner, strict=False):
                for argument in _parameters(branch):
                    self._edges(values, self._values(branch, argument.name))
                self._edges(self._values(branch, branch.root.name), results)
        elif inner and i.opcode in ("fusion", "call", "async-start"):
            (called,) = inner
            for argument in _parameters(called):
                number = _number(argument)
                if number < len(given):
                    self._edges(given[number], self._values(called, argument.name))
            self._edges(self._values(called, called.root.name), results)
        elif i.opcode == "get-tuple-element":
            (source,) = i.operands
            counts = _element_sizes(computation.instructions[source])
            place = int(captured(r"index=(\d+)", i.text))
            first = sum(counts[:place])
            self._edges(given[0][first : first + counts[place]], results)
        elif i.opcode == "tuple" or i.opcode in _ONE_TO_ONE:
            self._edges(flat, results)
        elif i.opcode in ("send", "recv") and (message := _message(i)):
            if i.opcode == "send":
                self._sent[message] += flat
            else:
                self._received[message] += results[:1]
        else:
            self._mix(flat, results)
            large = any(math.prod(dims) > 1 for _, dims, _ in i.shapes)
            if large and (i.opcode in _PRODUCTS or _KERNELS.search(i.text)):
                self._products.update(results)
            elif large and i.opcode in _SUMS:
                self._summed.update((s, r) for s in flat for r in results)


def _closure(
    start: Iterable[Value],
    edges: dict[Value, list[Value]],
    barred: Set[Value] = frozenset(),
    forbidden: Set[tuple[Value, Value]] = frozenset(),
) -> set[Value]:
    """All values that edges lead to, not through those barred, not along those forbidden."""
    found = set(start)
    todo = list(found)
    while todo:
        value = todo.pop()
        if value in barred:
            continue
        for other in edges[value] if value in edges else ():
            if other not in found and (other, value) not in forbidden:
                found.add(other)
                todo.append(other)
    return found


def captured(pattern: str, text: str) -> str:
    """The first group of a pattern in an instruction that must have it.

    Raises:
      ValueError: if it does not.
    """
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"An instruction without {pattern!r} is not HLO as XLA writes it: {text}")
    return found.group(1)


def _parameters(computation: Any) -> list[Any]:
    return [i for i in computation.instructions.values() if i.opcode == "parameter"]


def _number(parameter: Any) -> int:
    return int(captured(r"parameter\((\d+)\)", parameter.text))


def _message(i: Any) -> str:
    """The name of what goes to another slice and comes back, through the host."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]+)"', i.text)
    return found.group(1) if found else ""


def _element_sizes(i: Any) -> list[int]:
    """How many arrays each element of a tuple holds, tuples inside it counted through."""
    depth, sizes = 0, [0]
    for token in re.findall(r"[a-z]+\d*(?:e\dm\d\w*)?\[[\d,]*\](?:\{[^{}]*\})?|[(),]", i.result):
        if token == "(":
            depth += 1
        elif token == ")":
            depth -= 1
        elif token == ",":
            if depth == 1:
                sizes.append(0)
        else:
            sizes[-1] += not token.startswith("token")
    return sizes
