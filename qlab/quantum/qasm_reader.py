"""The statements of OpenQASM as PennyLane operations: gate names, and a walk over the syntax tree."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pennylane as qml

from qlab.lab.errors import UserError, nearest


def _three(theta, phi, lam, wires):
    return qml.U3(theta, phi, lam, wires=wires)


def _controlled(make: Callable[..., Any], num: int = 1) -> Callable[..., Any]:
    return lambda *p, wires: qml.ctrl(make(*p, wires=wires[num:]), control=wires[:num])


# name -> (number of angles, of qubits, constructor)
GATES: dict[str, tuple[int, int, Callable[..., Any]]] = {
    "U": (3, 1, qml.U3), "u3": (3, 1, qml.U3), "u": (3, 1, qml.U3),
    "u2": (2, 1, qml.U2), "u1": (1, 1, qml.PhaseShift), "p": (1, 1, qml.PhaseShift),
    "phase": (1, 1, qml.PhaseShift), "u0": (1, 1, lambda _, wires: qml.Identity(wires)),
    "id": (0, 1, qml.Identity), "x": (0, 1, qml.X), "y": (0, 1, qml.Y), "z": (0, 1, qml.Z),
    "h": (0, 1, qml.Hadamard), "s": (0, 1, qml.S), "t": (0, 1, qml.T), "sx": (0, 1, qml.SX),
    "sdg": (0, 1, lambda wires: qml.adjoint(qml.S(wires))),
    "tdg": (0, 1, lambda wires: qml.adjoint(qml.T(wires))),
    "sxdg": (0, 1, lambda wires: qml.adjoint(qml.SX(wires))),
    "rx": (1, 1, qml.RX), "ry": (1, 1, qml.RY), "rz": (1, 1, qml.RZ),
    "CX": (0, 2, qml.CNOT), "cx": (0, 2, qml.CNOT), "cy": (0, 2, qml.CY), "cz": (0, 2, qml.CZ),
    "ch": (0, 2, qml.CH), "swap": (0, 2, qml.SWAP), "csx": (0, 2, _controlled(qml.SX)),
    "crx": (1, 2, qml.CRX), "cry": (1, 2, qml.CRY), "crz": (1, 2, qml.CRZ),
    "cu1": (1, 2, qml.ControlledPhaseShift), "cp": (1, 2, qml.ControlledPhaseShift),
    "cphase": (1, 2, qml.ControlledPhaseShift), "cu3": (3, 2, _controlled(_three)),
    "rxx": (1, 2, qml.IsingXX), "ryy": (1, 2, qml.IsingYY), "rzz": (1, 2, qml.IsingZZ),
    "ccx": (0, 3, qml.Toffoli), "cswap": (0, 3, qml.CSWAP),
    "c3x": (0, 4, lambda wires: qml.MultiControlledX(wires)),
    "c4x": (0, 5, lambda wires: qml.MultiControlledX(wires)),
    "c3sqrtx": (0, 4, _controlled(qml.SX, 3)),
}  # fmt: skip
FUNCTIONS = {
    "sin": math.sin, "cos": math.cos, "tan": math.tan, "exp": math.exp, "ln": math.log,
    "log": math.log, "sqrt": math.sqrt, "arcsin": math.asin, "arccos": math.acos, "arctan": math.atan,
}  # fmt: skip
CONSTANTS = {"pi": math.pi, "π": math.pi, "tau": math.tau, "euler": math.e}
BINARY: dict[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "**": math.pow, "^": math.pow, "%": operator.mod,
}  # fmt: skip
INCLUDES = ("qelib1.inc", "stdgates.inc")

Bit = tuple[str, int]


class Step(NamedTuple):
    """One instruction. kind: "gate" (op), "measure" (wire -> bit), "reset" (wire), or "if" (see below).

    condition: (bits, least significant first; value): op happens only where they spell the value.
    """

    kind: str
    op: Any = None
    wire: int = -1
    bit: Bit | None = None
    condition: tuple[tuple[Bit, ...], int] | None = None


class Reader:
    """Walks the statements once; state: declarations and steps so far."""

    def __init__(self, name: str):
        self.name = name
        self.registers: dict[str, tuple[int, ...]] = {}
        self.bits: dict[str, int] = {}
        self.constants: dict[str, float] = dict(CONSTANTS)
        self.defined: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.line = 0

    def fail(self, what: str) -> UserError:
        return UserError(f"{self.name}: line {self.line}: {what}")

    def parts(self) -> tuple[list[Step], dict[Bit, int]]:
        """(steps, {bit: wire} of the final measurements): no later step touches their wire, and no condition reads their bit."""
        used: set[int] = set()
        read: set[Bit] = set()
        measured: dict[Bit, int] = {}
        kept: list[Step] = []
        for s in reversed(self.steps):
            if (
                s.kind == "measure"
                and s.wire not in used
                and s.bit not in read
                and s.bit not in measured
            ):
                assert s.bit is not None
                measured[s.bit] = s.wire
                continue
            used |= {s.wire} if s.op is None else set(s.op.wires)
            read |= set(s.condition[0]) if s.condition else set()
            kept.append(s)
        return kept[::-1], measured

    # -- statements

    def read(self, s: Any, condition=None) -> None:
        self.line = s.span.start_line if s.span else self.line
        kind = type(s).__name__
        method = getattr(self, f"_{kind}", None)
        if method is None or (condition is not None and kind not in ("QuantumGate",)):
            hint = "; qml.from_qasm3 reads all of OpenQASM 3" if condition is None else " inside if"
            raise self.fail(f"{kind} is not read{hint}")
        method(s, condition) if kind == "QuantumGate" else method(s)

    def _Include(self, s) -> None:
        if s.filename not in INCLUDES:
            raise self.fail(
                f"include {s.filename!r}: only {' and '.join(INCLUDES)} are known; paste its gates"
            )

    def _QubitDeclaration(self, s) -> None:
        size = 1 if s.size is None else int(self.number(s.size))
        self._new(s.qubit.name, size)
        first = sum(map(len, self.registers.values()))
        self.registers[s.qubit.name] = tuple(range(first, first + size))

    def _new(self, name: str, size: int) -> None:
        if name in self.registers or name in self.bits:
            raise self.fail(f"{name!r} is declared twice")
        if size < 1:
            raise self.fail(f"{name}[{size}]: a register has at least one entry")

    def _ClassicalDeclaration(self, s) -> None:
        if type(s.type).__name__ != "BitType":
            raise self.fail(
                f"variables of {type(s.type).__name__} are not read; qml.from_qasm3 reads them"
            )
        size = 1 if s.type.size is None else int(self.number(s.type.size))
        self._new(s.identifier.name, size)
        self.bits[s.identifier.name] = size
        if s.init_expression is not None:
            target = type("Target", (), {"name": s.identifier.name, "indices": []})
            self._measure(s.init_expression, target)

    def _QuantumPhase(self, s) -> None:
        if s.modifiers:
            raise self.fail("a controlled gphase is not read; write it as p")

    def _ConstantDeclaration(self, s) -> None:
        self.constants[s.identifier.name] = self.number(s.init_expression)

    def _QuantumGateDefinition(self, s) -> None:
        if s.name.name in self.defined:
            raise self.fail(f"gate {s.name.name!r} is defined twice")
        self.defined[s.name.name] = s

    def _QuantumBarrier(self, s) -> None:
        for q in s.qubits:
            self.wires(q)

    def _QuantumReset(self, s) -> None:
        self.steps += [Step("reset", wire=w) for w in self.wires(s.qubits)]

    def _QuantumMeasurementStatement(self, s) -> None:
        self._measure(s.measure, s.target)

    def _measure(self, measure, target) -> None:
        if type(measure).__name__ != "QuantumMeasurement":
            raise self.fail("only a measurement can be assigned to bits")
        wires = self.wires(measure.qubit)
        if target is None:
            raise self.fail("a measurement needs bits to go to: c = measure q")
        bits = self.bit_refs(target)
        if len(bits) != len(wires):
            raise self.fail(f"{len(wires)} qubits are measured into {len(bits)} bits")
        self.steps += [Step("measure", wire=w, bit=b) for w, b in zip(wires, bits, strict=True)]

    def _BranchingStatement(self, s) -> None:
        if s.else_block:
            raise self.fail("else is not read; qml.from_qasm3 reads all of OpenQASM 3")
        test = s.condition
        if type(test).__name__ == "BinaryExpression" and test.op.name == "==":
            condition = tuple(self.bit_refs(test.lhs)), int(self.number(test.rhs))
        elif type(test).__name__ in ("Identifier", "IndexExpression", "IndexedIdentifier"):
            condition = tuple(self.bit_refs(test)), 1
        else:
            raise self.fail("if takes bits == number")
        for inner in s.if_block:
            self.read(inner, condition)

    def _QuantumGate(self, s, condition=None) -> None:
        angles = [self.number(a) for a in s.arguments]
        groups = [self.wires(q) for q in s.qubits]
        for op in self.gate(s.name.name, angles, groups, s.modifiers):
            self.steps.append(Step("gate" if condition is None else "if", op, condition=condition))

    # -- gates

    def gate(
        self, name: str, angles: list[float], groups: Sequence[Sequence[int]], modifiers=()
    ) -> list[Any]:
        """The operations of a call; registers are broadcast over."""
        sizes = {len(g) for g in groups} - {1}
        if len(sizes) > 1:
            raise self.fail(
                f"gate {name}: registers of {' and '.join(map(str, sorted(sizes)))} qubits do not match"
            )
        made = []
        for i in range(max(sizes, default=1)):
            wires = [g[i] if len(g) > 1 else g[0] for g in groups]
            if len(set(wires)) != len(wires):
                raise self.fail(f"gate {name}: a qubit stands twice among its arguments")
            made += self.modified(name, angles, wires, list(modifiers))
        return made

    def modified(
        self, name: str, angles: list[float], wires: list[int], modifiers: list[Any]
    ) -> list[Any]:
        if not modifiers:
            return self.plain(name, angles, wires)
        first, rest = modifiers[0], modifiers[1:]
        what = first.modifier.name
        if what in ("ctrl", "negctrl"):
            num = 1 if first.argument is None else int(self.number(first.argument))
            inner = self.modified(name, angles, wires[num:], rest)
            values = [what == "ctrl"] * num
            return [qml.ctrl(op, control=wires[:num], control_values=values) for op in inner]
        inner = self.modified(name, angles, wires, rest)
        if what == "inv":
            return [qml.adjoint(op, lazy=False) for op in reversed(inner)]
        power = self.number(first.argument)
        if len(inner) > 1 and power != int(power):
            raise self.fail(f"pow({power:g}) of {name}, which is several gates")
        if len(inner) == 1:
            raised: Any = qml.pow(inner[0], power, lazy=False)  # type: ignore[arg-type]
            return [raised]
        back = [qml.adjoint(op, lazy=False) for op in reversed(inner)]
        return (inner if power >= 0 else back) * abs(int(power))

    def plain(self, name: str, angles: list[float], wires: list[int]) -> list[Any]:
        if name in self.defined:
            s = self.defined[name]
            self._counts(name, len(s.arguments), len(s.qubits), angles, wires)
            inner = Reader(f"{self.name}, gate {name}")
            inner.defined = {k: v for k, v in self.defined.items() if k != name}
            inner.constants = self.constants | {
                a.name: v for a, v in zip(s.arguments, angles, strict=True)
            }
            inner.registers = {q.name: (w,) for q, w in zip(s.qubits, wires, strict=True)}
            for statement in s.body:
                inner.read(statement)
            return [step.op for step in inner.steps]
        if name not in GATES:
            known = (*GATES, *self.defined)
            raise self.fail(f"gate {name!r} is not known{nearest(name, known)}")
        num_angles, num_qubits, make = GATES[name]
        self._counts(name, num_angles, num_qubits, angles, wires)
        return [make(*angles, wires=wires)]

    def _counts(self, name, num_angles: int, num_qubits: int, angles, wires) -> None:
        if len(angles) != num_angles or len(wires) != num_qubits:
            raise self.fail(
                f"gate {name} takes {num_angles} angles and {num_qubits} qubits, not {len(angles)} and {len(wires)}"
            )

    # -- references and numbers

    def wires(self, q: Any) -> list[int]:
        name, indices = _reference(q)
        if name not in self.registers:
            raise self.fail(f"no qubits are called {name!r}{nearest(name, tuple(self.registers))}")
        return self._entries(name, list(self.registers[name]), indices)

    def bit_refs(self, b: Any) -> list[Bit]:
        name, indices = _reference(b)
        if name not in self.bits:
            raise self.fail(f"no bits are called {name!r}{nearest(name, tuple(self.bits))}")
        return self._entries(name, bit_names(name, self.bits[name]), indices)

    def _entries(self, name: str, entries: list[Any], indices: list[Any]) -> list[Any]:
        if not indices:
            return entries
        i = int(self.number(indices[0]))
        if not -len(entries) <= i < len(entries):
            raise self.fail(f"{name}[{i}] does not exist; {name} has {len(entries)} entries")
        return [entries[i]]

    def number(self, e: Any) -> float:
        """The value of a constant expression."""
        kind = type(e).__name__
        if kind in ("IntegerLiteral", "FloatLiteral"):
            return e.value
        if kind == "Identifier":
            if e.name not in self.constants:
                raise self.fail(f"{e.name!r} has no value{nearest(e.name, tuple(self.constants))}")
            return self.constants[e.name]
        if kind == "UnaryExpression" and e.op.name in "+-":
            value = self.number(e.expression)
            return -value if e.op.name == "-" else value
        try:
            if kind == "BinaryExpression" and e.op.name in BINARY:
                return BINARY[e.op.name](self.number(e.lhs), self.number(e.rhs))
            if kind == "FunctionCall" and e.name.name in FUNCTIONS:
                return FUNCTIONS[e.name.name](*map(self.number, e.arguments))
        except (ArithmeticError, ValueError, TypeError) as error:
            raise self.fail(f"an expression has no value: {error}") from None
        raise self.fail(f"{kind} is no constant expression")


def _reference(e: Any) -> tuple[str, list[Any]]:
    """(name, indices) of `q`, `q[i]` in any of the forms the parser gives."""
    kind = type(e).__name__
    if kind == "IndexedIdentifier":
        return e.name.name, [i for group in e.indices for i in group]
    if kind == "IndexExpression":
        return e.collection.name, list(e.index)
    return e.name, list(getattr(e, "indices", []))


def bit_names(name: str, size: int) -> list[Bit]:
    return [(name, i) for i in range(size)]
