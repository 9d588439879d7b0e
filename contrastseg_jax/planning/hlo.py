"""Collectives of a compiled program, read from its HLO text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")

COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.+?) ([a-z][\w\-]*)\((.*)$")
NAMES = re.compile(r"%([\w.\-]+)")
ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(%[\w.\-]+|\{.*?\})"
)
TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclass(frozen=True)
class Collective:
    """One collective operation, per device."""

    kind: str  # one of KINDS
    num_bytes: int  # operand bytes per execution; for an all-gather, result bytes
    times: int = 1  # per run of the program
    in_loop: bool = False  # with an unknown trip count: `times` is for one iteration


@dataclass(frozen=True)
class Instruction:
    """A line of HLO."""

    result: str  # type, or types in parentheses
    name: str
    rest: str  # operands, attributes, metadata


Computations = dict[str, dict[str, Instruction]]


def collectives(text: str) -> list[Collective]:
    """The collectives of a program, from `Compiled.as_text()`.

    Those in a loop count as often as its known trip count. Of the branches of a conditional,
    the one that moves most bytes counts. The parts of an asynchronous operation count once.
    """
    computations, entry = _parse(text)
    return list(_walk(computations, entry))


def total_bytes(found: list[Collective]) -> int:
    """Bytes of all of them per execution of the program, on one device."""
    return sum(c.num_bytes * c.times for c in found)


def num_bytes(types: str) -> int:
    """Bytes of the arrays in an HLO type: `(f32[8,4]{1,0}, pred[])` has 129."""
    return sum(
        math.ceil(math.prod(int(n) for n in shape.split(",") if n) * _bits(kind) / 8)
        for kind, shape in ARRAY.findall(types)
    )


def _bits(kind: str) -> int:
    digits = re.search(r"\d+", kind)  # f8e4m3fn has 8
    return int(digits[0]) if digits else 8  # pred


def _parse(text: str) -> tuple[Computations, str]:
    """The instructions of every computation by name, and the name of the entry."""
    computations: Computations = {}
    entry = name = ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = head[2]
            computations[name] = {}
            entry = name if head[1] else entry
        elif name and (found := INSTRUCTION.match(line)):
            computations[name][found[1]] = Instruction(found[2], found[3], found[4])
    return computations, entry


def _walk(computations: Computations, name: str) -> Iterator[Collective]:
    """The collectives of a computation and of all it calls.

    Asynchronous ones are counted at their start; on TPUs they may be spread over several fusions.
    """
    instructions = computations.get(name, {})
    for key, instruction in instructions.items():
        kind = instruction.name.removesuffix("-start")
        if kind in KINDS:
            yield Collective(kind, _sent_bytes(instruction, instructions))
        elif not (
            instruction.name.endswith(("-done", "-update"))
            or key.startswith("async-collective-done")
            or "calls=%async_collective_fusion" in instruction.rest
        ):
            yield from _walk_called(computations, instruction)


def _walk_called(computations: Computations, instruction: Instruction) -> Iterator[Collective]:
    called = [name for text in CALLED.findall(instruction.rest) for name in NAMES.findall(text)]
    inside = [list(_walk(computations, name)) for name in called]
    if instruction.name == "conditional":
        yield from max(inside, key=total_bytes, default=[])
        return
    trip_count, is_loop = TRIP_COUNT.search(instruction.rest), instruction.name == "while"
    for collective in (c for part in inside for c in part):
        yield replace(
            collective,
            times=collective.times * (int(trip_count[1]) if is_loop and trip_count else 1),
            in_loop=collective.in_loop or (is_loop and not trip_count),
        )


def _sent_bytes(instruction: Instruction, instructions: dict[str, Instruction]) -> int:
    """`Collective.num_bytes`; an all-gather-start returns both its operands and its results."""
    operands, _, _ = instruction.rest.partition("), ")
    names = [name for name in NAMES.findall(operands) if name in instructions]
    given = sum(num_bytes(instructions[name].result) for name in names)
    if not instruction.name.startswith("all-gather"):
        return given
    return num_bytes(instruction.result) - (given if instruction.name.endswith("-start") else 0)
