"""Reading a compiled program: its collectives and its traffic to memory, from XLA's text.

The text is the scheduled module that XLA made for one chip. Computations that a loop calls count as
often as the loop runs, which is read off its condition; where that cannot be told they count once.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from zoo.planning.flow import Flow, captured

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
"""Bytes of an element, where the name of its type does not say its bits."""

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BETWEEN = " between slices"
"""Ends the kind of what the data centre's network carries."""
SILENT = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "opt-barrier", "iota"),
}
"""Instructions that move nothing by themselves."""

Shape = tuple[str, tuple[int, ...], int]  # type, dims, memory space (0: HBM)

_SHAPE = re.compile(r"([a-z]+\d*(?:e\dm\d\w*)?)\[([\d,]*)\](?:\{[^{}]*?(?:S\((\d+)\))?\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?<=[ )}\]])([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations"
    r"|true_computation|false_computation)="
    r"(?:%?([\w.\-]+)|\{([^}]*)\})"
)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; several for a tuple
    operands: tuple[str, ...]
    text: str  # all of it
    root: bool
    result: str  # the type of the result, as written

    @property
    def called(self) -> list[str]:
        """The computations that it names, each once."""
        return list(dict.fromkeys(_called(self.text)))


@dataclass
class Computation:
    """A function of the program."""

    name: str
    entry: bool
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions.values() if i.root)


@dataclass(frozen=True)
class Collective:
    """A collective of the program, as one chip sees it.

    Attributes:
      kind: `all-gather` ...; `all-reduce` of arrays that each chip fills a part of, which is how
        the compiler gathers small ones, is an `all-gather` as well. `all-reduce between slices`
        runs over the data centre's network, not over that of a slice.
      shapes: type and dims of what arrives (of what is summed, for reductions).
      bytes: of these, of one run.
      times: how often it runs in a step.
      known: False if it stands in a loop whose length the text does not say; `times` then counts
        one iteration of it.
      group: chips (slices, between these) that take part together (0: all).
      source: the operation of the model that it serves.
      of_parameters: of each of the shapes, whether it is of the parameters (`zoo.planning.flow`).
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: float
    times: int
    known: bool
    group: int
    source: str
    of_parameters: tuple[bool, ...]


class Module:
    """A parsed program."""

    def __init__(self, text: str) -> None:
        """Parse; `text` is that of a scheduled module."""
        self.computations = parse(text)
        self.header = text.partition("\n")[0]
        self.times, self.known = self._multiplicities()

    def collectives(self) -> list[Collective]:
        """Every collective once, whether it is one instruction or spread over several."""
        found: dict[Any, Collective] = {}
        flow = Flow(self.computations, self.header)
        for computation in self.computations.values():
            times = self.times.get(computation.name, 0)
            if not times:
                continue
            for i in computation.instructions.values():
                kind = _collective_kind(i)
                if kind is None:
                    continue
                channel = re.search(r"channel_id=(\d+)", i.text)
                key = int(channel.group(1)) if channel else (computation.name, i.name)
                known = found.get(key)
                if known is None or times < known.times:  # it starts once, where it runs in parts
                    found[key] = self._collective(computation, i, kind, times, flow)
        return list(found.values())

    def traffic(self) -> float:
        """Bytes that a step reads from and writes to HBM, by the operands of its instructions.

        What the compiler keeps in the chip's own memory does not count; of an operand that is
        only sliced, the slices do. Kernels count their operands once.
        """
        fused = {
            name
            for computation in self.computations.values()
            for i in computation.instructions.values()
            if i.opcode not in ("while", "conditional", "call")
            for name in _called(i.text)
        }
        total = 0.0
        for computation in self.computations.values():
            times = self.times.get(computation.name, 0)
            if times and computation.name not in fused:
                total += times * sum(
                    self._moved(computation, i) for i in computation.instructions.values()
                )
        return total

    # ------------------------------------------------------------------------ how often

    def _multiplicities(self) -> tuple[dict[str, int], dict[str, bool]]:
        """How often each computation runs, and whether that is known."""
        times: dict[str, int] = defaultdict(int)
        known: dict[str, bool] = defaultdict(lambda: True)
        entry = next(c.name for c in self.computations.values() if c.entry)

        def visit(name: str, count: int, sure: bool) -> None:
            times[name] += count
            known[name] = known[name] and sure
            for i in self.computations[name].instructions.values():
                called = [c for c in _called(i.text) if c in self.computations]
                trips = self._trips(self.computations[name], i) if i.opcode == "while" else 1
                for inner in called:
                    visit(inner, count * (trips or 1), sure and trips is not None)

        visit(entry, 1, True)
        return dict(times), dict(known)

    def _trips(self, computation: Computation, loop: Instruction) -> int | None:
        """Iterations of a loop that counts up to a constant; None if it is another kind."""
        stated = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.text)
        if stated:
            return int(stated.group(1))
        names = {
            kind: captured(rf"{kind}=%?([\w.\-]+)", loop.text) for kind in ("condition", "body")
        }
        condition, body = (self.computations[names[kind]] for kind in ("condition", "body"))
        test = condition.root
        if test.opcode != "compare" or "direction=LT" not in test.text:
            return None
        counter, bound = (condition.instructions[name] for name in test.operands)
        index = re.search(r"index=(\d+)", counter.text)
        limit, slot = _constant(bound), int(index.group(1)) if index else None
        if limit is None or slot is None or counter.opcode != "get-tuple-element":
            return None
        first = self._initial(computation, loop.operands[0], slot)
        step = self._increment(body, slot)
        if first is None or not step:
            return None
        return max(0, -(-(limit - first) // step))

    def _initial(self, computation: Computation, name: str, slot: int) -> int | None:
        """The constant that a loop's tuple starts with in a place."""
        start = computation.instructions.get(name)
        if start is None or start.opcode != "tuple":
            return None
        value = computation.instructions[start.operands[slot]]
        while value.opcode in ("copy", "bitcast") and value.operands:
            value = computation.instructions[value.operands[0]]
        return _constant(value)

    def _increment(self, body: Computation, slot: int) -> int | None:
        """What a loop's body adds to a place of its tuple."""
        if body.root.opcode != "tuple":
            return None
        value = body.instructions[body.root.operands[slot]]
        if value.opcode == "fusion":  # the addition alone, or with others in one loop
            return 1
        if value.opcode != "add":
            return None
        found = [_constant(body.instructions[name]) for name in value.operands]
        return next((n for n in found if n is not None), None)

    # ------------------------------------------------------------------------ one instruction

    def _collective(
        self, computation: Computation, i: Instruction, kind: str, times: int, flow: Flow
    ) -> Collective:
        given = [s for name in i.operands for s in computation.instructions[name].shapes]
        group = _group(i.text)
        arrives = kind == "all-gather" or kind == "collective-broadcast"
        shapes = i.shapes[len(given) :] if i.opcode.endswith("-start") else i.shapes
        shapes = shapes[: len(given)] if arrives else tuple(given)
        if kind == "all-reduce" and i.operands and self._parts(computation, i.operands):
            kind = "all-gather"
        source = re.search(r'op_name="((?:[^"\\]|\\.)*)"', i.text)
        what = [
            flow.of_parameters(computation.name, i, n, kind)
            for n, name in enumerate(i.operands)
            for _ in computation.instructions[name].shapes
        ]
        return Collective(
            kind,
            tuple((s[0], s[1]) for s in shapes),
            sum(size(s) for s in shapes),
            times,
            self.known[computation.name],
            group,
            source.group(1).replace("\\", "") if source else "",
            tuple(what),
        )

    def _parts(self, computation: Computation, names: tuple[str, ...]) -> bool:
        """Whether all of these arrays are zeros with a part written into them."""
        for name in names:
            made = computation.instructions[name]
            if made.opcode == "fusion":
                made = self.computations[_called(made.text)[0]].root
            if made.opcode != "dynamic-update-slice":
                return False
        return True

    def _moved(self, computation: Computation, i: Instruction) -> float:
        if i.opcode in SILENT or i.opcode.endswith(("-done", "-update")):
            return 0.0
        operands = [computation.instructions[name] for name in i.operands]
        whole = [sum(size(s) for s in o.shapes if s[2] == 0) for o in operands]
        results = sum(size(s) for s in i.shapes if s[2] == 0)
        if i.opcode.endswith("-start"):  # a copy; the result repeats the operands
            return sum(whole)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * results if whole and whole[0] else results
        if i.opcode == "dynamic-update-slice":
            return whole[1] + (size(operands[1].shapes[0]) if results else 0.0)
        if i.opcode != "fusion":
            return sum(whole) + results
        inside = self.computations[_called(i.text)[0]]
        return self._read(inside, whole) + self._written(inside, i)

    def _read(self, inside: Computation, whole: list[float]) -> float:
        """Of a fusion's operands: the slices, where nothing else is done with an operand."""
        users = defaultdict(list)
        for i in inside.instructions.values():
            for place, name in enumerate(i.operands):
                users[name].append((i, place))
        total = 0.0
        for i in inside.instructions.values():
            if i.opcode != "parameter":
                continue
            number = int(captured(r"parameter\((\d+)\)", i.text))
            if number >= len(whole) or not whole[number]:
                continue
            parts = []
            for user, place in users[i.name]:
                if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    parts.append(size(user.shapes[0]))
                elif user.opcode == "dynamic-update-slice" and place == 0:
                    parts.append(0.0)
                else:
                    parts.append(whole[number])
            total += min(whole[number], sum(parts))
        return total

    def _written(self, inside: Computation, i: Instruction) -> float:
        """Of a fusion's results: the part that is new, where it updates an array in place."""
        root = inside.root
        makers = (
            [inside.instructions[n] for n in root.operands] if root.opcode == "tuple" else [root]
        )
        if len(makers) != len(i.shapes):
            return sum(size(s) for s in i.shapes if s[2] == 0)
        total = 0.0
        for made, shape in zip(makers, i.shapes, strict=True):
            if shape[2] == 0:
                update = made.opcode == "dynamic-update-slice"
                new = inside.instructions[made.operands[1]].shapes[0] if update else shape
                total += size(new)
        return total


def size(shape: Shape) -> float:
    """Bytes of an array, without padding."""
    kind, dims, _ = shape
    if kind in BYTES:
        each = BYTES[kind]
    else:
        bits = re.match(r"[a-z]+(\d+)", kind)
        each = int(bits.group(1)) / 8 if bits else 0
    return each * math.prod(dims)


def parse(text: str) -> dict[str, Computation]:
    """Computations by name."""
    computations: dict[str, Computation] = {}
    current: Computation | None = None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = Computation(head.group(2), bool(head.group(1)))
                computations[current.name] = current
        elif line.startswith("}"):
            current = None
        elif match := _LINE.match(line):
            root, name, rest = match.groups()
            current.instructions[name] = _instruction(name, rest, bool(root))
    return computations


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    opcode = _OPCODE.search(rest)
    if opcode is None:
        raise ValueError(f"An instruction without an operation is not HLO as XLA writes it: {rest}")
    result, arguments = rest[: opcode.start()], _closed(rest[opcode.end() :])
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    return Instruction(name, opcode.group(1), tuple(_shapes(result)), operands, rest, root, result)


def _shapes(text: str) -> Iterator[Shape]:
    for kind, dims, space in _SHAPE.findall(text):
        if kind != "token":
            yield kind, tuple(int(d) for d in dims.split(",") if d), int(space or 0)


def _closed(text: str) -> str:
    """Up to the bracket that closes what was opened before."""
    depth = 1
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return text[:at]
    return text


def _called(text: str) -> list[str]:
    names = []
    for one, several in _CALLED.findall(text):
        names += [one] if one else re.findall(r"%?([\w.\-]+)", several)
    return names


def _constant(i: Instruction) -> int | None:
    value = re.search(r"constant\((-?\d+)\)", i.text) if i.opcode == "constant" else None
    return int(value.group(1)) if value else None


def _collective_kind(i: Instruction) -> str | None:
    """`all-gather` ...; what goes between slices is written as a message to the host."""
    if i.opcode == "send":
        transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', i.text)
        return transfer and transfer.group(1).lower().replace("_", "-") + BETWEEN
    kind = i.opcode.removesuffix("-start")
    return kind if kind in COLLECTIVES else None


def _group(text: str) -> int:
    """Chips of one group of a collective: `[4,2]<=[8]`, `{{0,1},{2,3}}` or axes of a named mesh.

    Between slices: how many of them, as in `{1,2}x{0:3}`.
    """
    if slices := re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', text):
        ends = [[int(n) for n in part.split(":")] for part in slices.group(1).split(",")]
        return sum(end[-1] - end[0] + 1 for end in ends)
    groups = re.search(r"replica_groups=(.*?)(?:, [a-z_]+=|$)", text)
    if not groups:
        return 0
    text = groups.group(1)
    if shape := re.match(r"\[(\d+),(\d+)\]<=", text):
        return int(shape.group(2))
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return len(listed.group(1).split(","))
    if axes := re.match(r"@?mesh\[(.*?)\] ?\{(.*?)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", axes.group(1)))
        names = re.findall(r"'([^']+)'", axes.group(2))
        return math.prod(int(sizes[name]) for name in names if name in sizes)
    return 0
