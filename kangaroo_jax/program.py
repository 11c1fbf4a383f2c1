"""Counts what a compiled program does: operations of its matrix products, bytes sent between devices, and what it
launches."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\(")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_LOOP_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_OP_NAME = re.compile(r'\bop_name="([^"]*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of communication.

    Attributes:
      count: how often it runs in one run of the program. What is inside a loop whose length the program does not state
        (XLA for TPU never does) counts once.
      num_bytes: bytes of all its results on one device.
    """

    count: int
    num_bytes: int


def collectives(text: str) -> dict[str, Collective]:
    """Kind -> communication of that kind, in a program given as optimised HLO text of one device."""
    counts, sizes, seen = collections.Counter(), collections.Counter(), set()
    for times, shape, operation, line in _executed(text):
        kind = operation.removesuffix("-done")
        # An asynchronous collective appears as two instructions; the -done half has its result.
        if kind not in KINDS:
            continue
        channel = _CHANNEL.search(line)
        if channel and not operation.endswith("-done"):
            # XLA for TPU repeats a collective in each of the fusions that it spreads it over.
            if (kind, channel.group(1)) in seen:
                continue
            seen.add((kind, channel.group(1)))
        counts[kind] += times
        sizes[kind] += times * _shape_bytes(shape)
    return {kind: Collective(counts[kind], sizes[kind]) for kind in KINDS if counts[kind]}


@dataclasses.dataclass(frozen=True)
class Launched:
    """What one run of a computation launches.

    Attributes:
      kernels: instructions that work on data: on a GPU, a kernel each.
      cycles: that the compiler estimates for them; XLA for TPU alone says.
    """

    kernels: int = 0
    cycles: int = 0

    def __add__(self, other: Launched) -> Launched:
        return Launched(self.kernels + other.kernels, self.cycles + other.cycles)

    def __sub__(self, other: Launched) -> Launched:
        return Launched(self.kernels - other.kernels, self.cycles - other.cycles)

    def __mul__(self, times: int) -> Launched:
        return Launched(self.kernels * times, self.cycles * times)


@dataclasses.dataclass(frozen=True)
class Body:
    """The entry of a program, or the body of one of its loops.

    Attributes:
      name: of the loop, with the scopes it is in (`jax.named_scope`); empty for the entry.
      instructions: the name of each instruction, with its scopes, and what it launches.
      loops: inside, whose bodies are not in `instructions`.
    """

    name: str
    instructions: tuple[tuple[str, Launched], ...]
    loops: tuple[Body, ...]

    @property
    def without_loops(self) -> Launched | None:
        """One run; None where loops are inside, as how often they turn is not said."""
        return None if self.loops else self.all

    @property
    def all(self) -> Launched:
        """One run without its loops."""
        return sum((launched for _, launched in self.instructions), Launched())

    def within(self, scope: str) -> Launched:
        """What of it is in a scope."""
        return sum((launched for name, launched in self.instructions if f"/{scope}/" in name), Launched())


# Instructions that move no data, or that only say when others have.
_FREE = re.compile(
    "parameter|constant|tuple|get-tuple-element|bitcast|after-all|add-dependency|opt-barrier|partition-id|"
    "(copy|slice|async)-(start|update|done)"
)
_DONE = re.compile(f"({'|'.join(KINDS)}|send|recv)-done")  # the second half of what was launched


def body(text: str) -> Body:
    """What a program launches, given as optimised HLO text of one device."""
    computations, entry = _computations(text)

    def read(computation: str, name: str) -> Body:
        instructions, loops = [], []
        for line in computations[computation]:
            found = _INSTRUCTION.match(line)
            if not found or _FREE.fullmatch(found.group(2)):
                continue
            label = _OP_NAME.search(line)
            label = "" if label is None else label.group(1)
            if found.group(2) == "while":
                loops.append(read(_LOOP_BODY.search(line).group(1), label))
                continue
            cycles = _CYCLES.search(line)
            kernels = 0 if _DONE.fullmatch(found.group(2)) else 1
            instructions.append((label, Launched(kernels, 0 if cycles is None else int(cycles.group(1)))))
        return Body(name, tuple(instructions), tuple(loops))

    return read(entry, "")


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Name -> lines of each computation of a program, and the name of its entry."""
    computations: dict[str, list[str]] = {}
    entry = current = None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = header.group(1)
            computations[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current is not None:
            computations[current].append(line)
    return computations, entry


def _executed(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yields (how often it runs, result's shape, operation, line) for each instruction that a run reaches."""
    computations, entry = _computations(text)

    def walk(name: str, times: int) -> Iterator[tuple[int, str, str, str]]:
        for line in computations.get(name, ()):
            found = _INSTRUCTION.match(line)
            if not found:
                continue
            yield times, *found.groups(), line
            if _CALLED.search(line):
                trips = _TRIPS.search(line)
                inner = times * (int(trips.group(1)) if trips and found.group(2) == "while" else 1)
                for callee in set(re.findall(r"%([\w.\-]+)", _called(line))) & computations.keys():
                    yield from walk(callee, inner)

    if entry is not None:
        yield from walk(entry, 1)


def _called(line: str) -> str:
    return " ".join(re.findall(r"\b\w*(?:body|condition|calls|to_apply|computations?)=(\{[^}]*\}|%[\w.\-]+)", line))


def _shape_bytes(shape: str) -> int:
    total = 0
    for kind, dimensions in _SHAPE.findall(shape):
        size = math.prod(int(x) for x in dimensions.split(",") if x)
        total += size * _item_bytes(kind)
    return total


def _item_bytes(kind: str) -> int:
    names = {"pred": "bool", "f": "float", "bf": "bfloat", "s": "int", "u": "uint", "c": "complex"}
    if kind == "pred":
        return 1
    prefix, bits = re.match(r"([a-z]+)(\d*)", kind).groups()
    if prefix not in names or not bits:
        return 0  # tokens and other types without data
    return jnp.dtype(f"{names[prefix]}{bits}").itemsize if bits in ("8", "16", "32", "64", "128") else 1


def matmul_operations(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products in a jaxpr, over all devices: a multiplication and an addition
    are two. A loop of unknown length counts for one pass, a branch as its costliest alternative."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
            continue
        inner = [matmul_operations(part) for part in _inner(equation.params)]
        if equation.primitive.name == "cond":
            total += max(inner, default=0)
        else:
            total += sum(inner) * equation.params.get("length", 1) if equation.primitive.name == "scan" else sum(inner)
    return total


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part
