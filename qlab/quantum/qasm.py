"""OpenQASM 2 and 3 in and out, as PennyLane operations.

    program = from_qasm(Path("adder_n10.qasm").read_text())
    qml.qnode(dev)(lambda: (program(), qml.probs(wires=program.measured_wires))[1])

`openqasm3` (extra `qlab[qasm]`) reads the text; here its statements become operations. Of OpenQASM 3 the static
part is read: qubits, bits, constants, gate definitions, modifiers, measurements, reset and `if` on bits; for
loops, subroutines and inputs use qml.from_qasm3. Qubits are numbered in the order of their declaration, qubit 0
leftmost as everywhere in PennyLane (Qiskit prints the last one leftmost). Global phases are not kept.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import pennylane as qml
from pennylane.tape import QuantumScript
from pennylane.wires import Wires

from qlab.lab.errors import UserError
from qlab.quantum.qasm_reader import Bit, Reader, Step, bit_names


class Program(NamedTuple):
    """A parsed program; calling it queues its operations (inside a QNode or a tape).

    Attributes:
      num_qubits: n; wires are 0 .. n - 1. registers: {name: its wires}. bits: {name: size}.
      steps: what is queued. measured: {bit: wire} of the measurements that end the program, which are
        left to the caller's return value.
    """

    num_qubits: int
    registers: Mapping[str, tuple[int, ...]]
    bits: Mapping[str, int]
    steps: tuple[Step, ...]
    measured: Mapping[Bit, int]

    @property
    def measured_wires(self) -> tuple[int, ...]:
        """Wires of the final measurements, in the order of the classical bits."""
        return tuple(
            self.measured[b]
            for n, size in self.bits.items()
            for b in bit_names(n, size)
            if b in self.measured
        )

    @property
    def operations(self) -> tuple[Any, ...]:
        """The gates of a program without measurements in its middle.

        Raises:
          UserError: it has some; call the program inside a QNode instead.
        """
        if any(s.kind != "gate" for s in self.steps):
            raise UserError(
                "the program measures, resets or branches before its end; call it inside a QNode"
            )
        return tuple(s.op for s in self.steps)

    def __call__(self) -> dict[Bit, Any]:
        values: dict[Bit, Any] = {}
        for s in self.steps:
            if s.kind == "gate" and s.condition is None:
                qml.apply(s.op)
            elif s.kind == "measure":
                assert s.bit is not None
                values[s.bit] = qml.measure(s.wire)
            elif s.kind == "reset":
                qml.measure(s.wire, reset=True)
            else:
                _conditional(s, values)
        return values


def _conditional(s: Step, values: Mapping[Bit, Any]) -> None:
    assert s.condition is not None
    bits, wanted = s.condition
    # a bit that nobody wrote is 0
    if any((wanted >> i) & 1 for i, b in enumerate(bits) if b not in values) or wanted >> len(bits):
        return
    known = [(i, values[b]) for i, b in enumerate(bits) if b in values]
    if not known:
        qml.apply(s.op)
        return
    total = sum((2**i * m for i, m in known[1:]), 2 ** known[0][0] * known[0][1])
    conditioned: Any = qml.cond(total == wanted, partial(qml.apply, s.op))
    conditioned()


def from_qasm(text: str, name: str = "program") -> Program:
    """Parses OpenQASM 2 or 3.

    Args:
      name: of the source, for messages.
    Raises:
      UserError: one line that names the source, the line and what is wrong there; openqasm3 is missing.

    >>> program = from_qasm("OPENQASM 2.0; qreg q[2]; creg c[2]; h q[0]; cx q[0],q[1]; measure q -> c;")
    >>> [op.name for op in program.operations], program.measured_wires
    (['Hadamard', 'CNOT'], (0, 1))
    """
    try:
        import openqasm3
        from openqasm3.parser import QASM3ParsingError
    except ImportError:
        raise UserError("reading OpenQASM needs openqasm3; pip install 'qlab[qasm]'") from None
    if not isinstance(text, str):
        raise UserError(f"{name}: a string of OpenQASM is expected, not a {type(text).__name__}")
    if not text.strip():
        raise UserError(f"{name}: the program is empty")
    said = io.StringIO()  # the parser's complaints, which it prints
    try:
        with contextlib.redirect_stderr(said):
            tree = openqasm3.parse(text)
    except QASM3ParsingError as e:
        raise UserError(f"{name}: {_complaint(said.getvalue(), e)}") from None
    reader = Reader(name)
    for statement in tree.statements:
        reader.read(statement)
    steps, measured = reader.parts()
    total = sum(map(len, reader.registers.values()))
    return Program(total, reader.registers, reader.bits, tuple(steps), measured)


def _complaint(said: str, error: BaseException) -> str:
    """Line and complaint, from what the parser printed or from the token that one of the causes holds."""
    found = re.match(r"line (\d+):\d+ (.*)", said)
    if found:
        return f"line {found[1]}: {found[2]}"
    cause: BaseException | None = error
    while cause is not None:
        for holder in (cause, *cause.args):
            token = getattr(holder, "offendingToken", None)
            if token is not None:
                return f"line {token.line}: {token.text!r} cannot be read here"
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0] if str(error) else "this is not OpenQASM"


def to_qasm(circuit: Any, *, version: int = 2, num_qubits: int | None = None) -> str:
    """OpenQASM of a sequence of PennyLane operations, a tape, or a Program without inner measurements.

    Gates that OpenQASM lacks are decomposed (by PennyLane); wires must be 0 .. n - 1.

    Raises:
      UserError: version is neither 2 nor 3, or a wire is no integer in that range.

    >>> print(to_qasm([qml.Hadamard(0), qml.CNOT([0, 1])], version=3))
    OPENQASM 3.0;
    include "stdgates.inc";
    qubit[2] q;
    h q[0];
    cx q[0],q[1];
    <BLANKLINE>
    """
    if version not in (2, 3):
        raise UserError(f"version={version!r}; OpenQASM 2 or 3 can be written")
    ops = list(circuit.operations if hasattr(circuit, "operations") else circuit)
    used = sorted({w for op in ops for w in op.wires}, key=str)
    if any(not isinstance(w, int) or w < 0 for w in used):
        raise UserError(f"wires {used}: OpenQASM needs wires 0 .. n - 1; use qml.map_wires first")
    total = num_qubits or getattr(circuit, "num_qubits", None) or (max(used, default=0) + 1)
    if max(used, default=0) >= total:
        raise UserError(f"num_qubits={total}, but wire {max(used)} is used")
    tape = QuantumScript(ops)
    text = qml.to_openqasm(tape, wires=Wires(range(total)), rotations=False, measure_all=False)
    # global phases come from decompositions; OpenQASM 2 has no word for them
    lines = [line for line in text.splitlines() if not line.startswith(("creg", "gphase"))]
    if version == 3:
        head = ("OPENQASM 3.0;", 'include "stdgates.inc";', f"qubit[{total}] q;")
        lines = [
            *head,
            *(line for line in lines if not line.startswith(("OPENQASM", "include", "qreg"))),
        ]
    return "\n".join(line for line in lines if line) + "\n"
