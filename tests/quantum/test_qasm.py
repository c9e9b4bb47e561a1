"""OpenQASM against the standard's own gate definitions, NumPy, and PennyLane's OpenQASM 3 reader."""

import os
from pathlib import Path

import numpy as np
import pennylane as qml
import pytest

from qlab.lab.errors import UserError
from qlab.quantum.qasm import Program, from_qasm, to_qasm
from qlab.quantum.qasm_reader import GATES

pytest.importorskip("openqasm3")
BENCH = Path(os.environ.get("QLAB_DATA", "")) / "qasmbench"
needs_bench = pytest.mark.skipif(not BENCH.is_dir(), reason="qasmbench is not under QLAB_DATA")

# The definitions of qelib1.inc (OpenQASM 2, arXiv 1707.03429) down to U and CX.
QELIB = """
gate u3(theta,phi,lambda) q { U(theta,phi,lambda) q; }
gate u2(phi,lambda) q { U(pi/2,phi,lambda) q; }
gate u1(lambda) q { U(0,0,lambda) q; }
gate cx c,t { CX c,t; }
gate id a { U(0,0,0) a; }
gate x a { u3(pi,0,pi) a; }
gate y a { u3(pi,pi/2,pi/2) a; }
gate z a { u1(pi) a; }
gate h a { u2(0,pi) a; }
gate s a { u1(pi/2) a; }
gate sdg a { u1(-pi/2) a; }
gate t a { u1(pi/4) a; }
gate tdg a { u1(-pi/4) a; }
gate rx(theta) a { u3(theta,-pi/2,pi/2) a; }
gate ry(theta) a { u3(theta,0,0) a; }
gate rz(phi) a { u1(phi) a; }
gate cz a,b { h b; cx a,b; h b; }
gate cy a,b { sdg b; cx a,b; s b; }
gate swap a,b { cx a,b; cx b,a; cx a,b; }
gate ch a,b { h b; sdg b; cx a,b; h b; t b; cx a,b; t b; h b; s b; x b; s a; }
gate ccx a,b,c { h c; cx b,c; tdg c; cx a,c; t c; cx b,c; tdg c; cx a,c; t b; t c; h c; cx a,b; t a; tdg b; cx a,b; }
gate cswap a,b,c { cx c,b; ccx a,b,c; cx c,b; }
gate crz(lambda) a,b { u1(lambda/2) b; cx a,b; u1(-lambda/2) b; cx a,b; }
gate cu1(lambda) a,b { u1(lambda/2) a; cx a,b; u1(-lambda/2) b; cx a,b; u1(lambda/2) b; }
gate cu3(theta,phi,lambda) c,t { u1((lambda+phi)/2) c; u1((lambda-phi)/2) t; cx c,t; u3(-theta/2,0,-(phi+lambda)/2) t; cx c,t; u3(theta/2,phi,0) t; }
gate rzz(theta) a,b { cx a,b; u1(theta) b; cx a,b; }
gate rxx(theta) a,b { u3(pi/2,theta,0) a; h b; cx a,b; u1(-theta) b; cx a,b; h b; u2(-pi,pi-theta) a; }
gate c3x a,b,c,d { h d; cu1(-pi/4) a,d; h d; cx a,b; h d; cu1(pi/4) b,d; h d; cx a,b; h d; cu1(-pi/4) b,d; h d;
  cx b,c; h d; cu1(pi/4) c,d; h d; cx a,c; h d; cu1(-pi/4) c,d; h d; cx b,c; h d; cu1(pi/4) c,d; h d; cx a,c;
  h d; cu1(-pi/4) c,d; h d; }
"""


def unitary(program: Program) -> np.ndarray:
    tape = qml.tape.QuantumScript(program.operations)
    return qml.matrix(tape, wire_order=range(program.num_qubits))


def same(a, b, atol=1e-6):
    """Equal up to a global phase."""
    at = np.unravel_index(np.argmax(np.abs(a)), a.shape)
    np.testing.assert_allclose(b * (a[at] / b[at]), a, atol=atol)


def test_u_and_cx_are_the_standards_matrices():
    th, ph, la = 0.3, 1.1, -0.7
    want = np.array(
        [
            [np.cos(th / 2), -np.exp(1j * la) * np.sin(th / 2)],
            [np.exp(1j * ph) * np.sin(th / 2), np.exp(1j * (ph + la)) * np.cos(th / 2)],
        ]
    )
    same(unitary(from_qasm("qubit q; U(0.3, 1.1, -0.7) q;")), want)
    cx = unitary(from_qasm("OPENQASM 2.0; qreg q[2]; CX q[0],q[1];"))
    np.testing.assert_allclose(
        cx, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]], atol=1e-9
    )


@pytest.mark.parametrize(
    "name",
    [line.split()[1].split("(")[0] for line in QELIB.splitlines() if line.startswith("gate")],
)
def test_every_gate_equals_its_definition(name):
    num_angles, num_qubits, _ = GATES[name]
    angles = f"({','.join(map(str, (0.7, -1.3, 2.1)[:num_angles]))})" if num_angles else ""
    head = f"OPENQASM 2.0; qreg q[{num_qubits}];"
    # a little spin on each qubit, so that relative phases count
    spin = "".join(f"U(0.{3 + i},0.{2 + i},0.{5 + i}) q[{i}];" for i in range(num_qubits))
    call = f"{name}{angles} {','.join(f'q[{i}]' for i in reversed(range(num_qubits)))};"
    ours = unitary(from_qasm(f'{head} include "qelib1.inc"; {spin} {call}'))
    same(ours, unitary(from_qasm(f"{head} {QELIB} {spin} {call}")))


@needs_bench
@pytest.mark.parametrize("path", sorted(BENCH.glob("*/*.qasm")), ids=lambda p: p.stem)
def test_qasmbench_is_read(path):
    if path.stem.startswith("vqe_uccsd"):  # these two use a register that they never declare
        with pytest.raises(
            UserError, match=r"vqe_uccsd_n\d.qasm: line \d+: no qubits are called 'q'"
        ):
            from_qasm(path.read_text(), path.name)
        return
    program = from_qasm(path.read_text(), path.name)
    if path.stem != "gcm_h6":  # the one whose name does not say
        assert program.num_qubits == int(path.stem.rsplit("n", 1)[1])
    assert program.steps


@needs_bench
@pytest.mark.parametrize(
    "name",
    ["adder_n10", "basis_change_n3", "dnn_n2", "error_correctiond3_n5", "fredkin_n3", "hs4_n4", "qaoa_n6", "qft_n4",
     "simon_n6", "toffoli_n3", "variational_n4", "wstate_n3"],
)  # fmt: skip
def test_qasmbench_with_and_without_the_standards_definitions(name):
    text = (BENCH / "small" / f"{name}.qasm").read_text()
    program = from_qasm(text)
    by_definition = from_qasm(text.replace('include "qelib1.inc";', QELIB))
    dev = qml.device("default.qubit", wires=program.num_qubits)
    a, b = (qml.QNode(lambda p=p: (p(), qml.state())[1], dev)() for p in (program, by_definition))
    same(np.asarray(a), np.asarray(b), atol=1e-5)
    back = from_qasm(to_qasm(program.operations, num_qubits=program.num_qubits))
    c = qml.QNode(lambda: (back(), qml.state())[1], dev)()
    same(np.asarray(a), np.asarray(c), atol=1e-5)


@needs_bench
def test_known_answers():
    def outcome(name):
        program = from_qasm((BENCH / f"{name}.qasm").read_text())
        dev = qml.device("default.qubit", wires=program.num_qubits)
        return np.asarray(
            qml.QNode(lambda: (program(), qml.probs(wires=program.measured_wires))[1], dev)()
        )

    w = outcome("small/wstate_n3")
    np.testing.assert_allclose(w[[1, 2, 4]], 1 / 3, atol=1e-2)  # its angles have few digits
    toffoli = outcome("small/toffoli_n3")
    assert toffoli[0b111] == pytest.approx(1.0, abs=1e-6)
    adder = outcome("small/adder_n10")  # a = 1, b = 15: the sum's low bits are 0, its carry 1
    assert adder.max() == pytest.approx(1.0, abs=1e-6)
    assert adder.argmax() == 0b00001


def random_ops(seed: int) -> list:
    rng = np.random.default_rng(seed)
    a = rng.uniform(-3, 3, 8)
    return [
        qml.RX(a[0], 0), qml.Rot(a[1], a[2], a[3], 1), qml.CRY(a[4], [2, 0]), qml.IsingZZ(a[5], [1, 2]),
        qml.adjoint(qml.T(1)), qml.CSWAP([0, 1, 2]), qml.SX(2), qml.ControlledPhaseShift(a[6], [0, 2]),
        qml.QubitUnitary(qml.matrix(qml.Rot(a[7], a[0], a[1], 0)), 1), qml.PauliRot(a[2], "XYZ", [0, 1, 2]),
    ]  # fmt: skip


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_round_trip(version, seed):
    ops = random_ops(seed)
    want = qml.matrix(qml.tape.QuantumScript(ops), wire_order=range(3))
    text = to_qasm(ops, version=version)
    assert text.startswith(f"OPENQASM {version}.0;\n")
    same(unitary(from_qasm(text)), want)
    if version == 3:
        bare = text.replace('include "stdgates.inc";', "")  # which theirs does not know
        with qml.queuing.AnnotatedQueue() as queue:
            qml.from_qasm3(bare)()
        tape = qml.tape.QuantumScript.from_queue(queue)
        same(qml.matrix(tape, wire_order=[f"q[{i}]" for i in range(3)]), want, atol=1e-5)


def test_modifiers_definitions_broadcast_and_constants():
    text = """OPENQASM 3.0; include "stdgates.inc";
    const float half = pi / 2;
    gate mine(a, b) p, q { rx(a + b) p; ctrl @ ry(-b) p, q; }
    qubit[2] r; qubit s;
    h r;
    mine(half, 0.25) r[0], s;
    inv @ mine(0.1, 0.2) r[1], s;
    negctrl @ ctrl @ x r[0], r[1], s;
    pow(-2) @ t r[-1];
    cx r, s;
    """
    ops = [
        qml.Hadamard(0), qml.Hadamard(1), qml.RX(np.pi / 2 + 0.25, 0), qml.CRY(-0.25, [0, 2]),
        qml.CRY(0.2, [1, 2]), qml.RX(-0.3, 1), qml.MultiControlledX([0, 1, 2], control_values=[0, 1]),
        qml.adjoint(qml.S(1)), qml.CNOT([0, 2]), qml.CNOT([1, 2]),
    ]  # fmt: skip
    same(unitary(from_qasm(text)), qml.matrix(qml.tape.QuantumScript(ops), wire_order=range(3)))


@pytest.mark.parametrize("theta", [0.4, 2.0])
def test_teleportation_with_measurements_in_the_middle(theta):
    text = f"""OPENQASM 2.0; include "qelib1.inc";
    qreg q[3]; creg m[1]; creg z[1]; creg out[1];
    ry({theta}) q[0];
    h q[1]; cx q[1],q[2]; cx q[0],q[1]; h q[0];
    measure q[0] -> z[0]; measure q[1] -> m[0];
    if (m==1) x q[2];
    if (z==1) z q[2];
    measure q[2] -> out[0];
    """
    program = from_qasm(text)
    assert program.measured == {("out", 0): 2}
    assert [s.kind for s in program.steps].count("measure") == 2
    with pytest.raises(UserError, match="inside a QNode"):
        _ = program.operations
    dev = qml.device("default.qubit")
    run = qml.QNode(lambda: (program(), [qml.expval(qml.Z(2)), qml.expval(qml.X(2))])[1], dev)
    np.testing.assert_allclose(run(), [np.cos(theta), np.sin(theta)], atol=1e-6)


def test_conditions_read_whole_registers_and_unwritten_bits_are_zero():
    text = """OPENQASM 2.0; include "qelib1.inc"; qreg q[3]; creg c[2];
    x q[1]; measure q[0] -> c[0]; measure q[1] -> c[1];
    if (c==2) x q[2];
    if (c==3) x q[2];
    """
    program = from_qasm(text)
    run = qml.QNode(lambda: (program(), qml.expval(qml.Z(2)))[1], qml.device("default.qubit"))
    assert run() == pytest.approx(-1.0)
    early = from_qasm(
        'OPENQASM 2.0; include "qelib1.inc"; qreg q[1]; creg c[1]; if (c==0) x q[0]; if (c==1) x q[0];'
    )
    run = qml.QNode(lambda: (early(), qml.expval(qml.Z(0)))[1], qml.device("default.qubit"))
    assert run() == pytest.approx(-1.0)


def test_a_measured_qubit_that_goes_on_is_kept_and_reset_empties_it():
    text = "OPENQASM 2.0; qreg q[1]; creg c[2]; U(pi,0,pi) q[0]; measure q[0] -> c[0]; reset q[0]; measure q[0] -> c[1];"
    program = from_qasm(text)
    assert program.measured == {("c", 1): 0}
    run = qml.QNode(lambda: (program(), qml.expval(qml.Z(0)))[1], qml.device("default.qubit"))
    assert run() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("OPENQASM 2.0;\nqreg q[2];\nhh q[0];", "program: line 3: gate 'hh' is not known; did you mean h"),
        ("qubit[2] q;\nrx q[0];", "line 2: gate rx takes 1 angles and 1 qubits, not 0 and 1"),
        ("qubit[2] q;\ncx q[0],q[0];", "line 2: gate cx: a qubit stands twice"),
        ("qubit[2] q;\nx q[2];", r"line 2: q\[2\] does not exist; q has 2 entries"),
        ("qubit[2] q; qubit[3] r;\ncx q,r;", "line 2: gate cx: registers of 2 and 3 qubits do not match"),
        ("qubit q;\nqubit q;", "line 2: 'q' is declared twice"),
        ("qubit q;\nx r;", "line 2: no qubits are called 'r'"),
        ("qubit q;\nrx(1/0) q;", "line 2: an expression has no value: division by zero"),
        ("qubit q;\nrx(alpha) q;", "line 2: 'alpha' has no value"),
        ("qubit[2] q; bit[3] c;\nc = measure q;", "line 2: 2 qubits are measured into 3 bits"),
        ("qubit q;\nfor int i in [0:2] { x q; }", "line 2: ForInLoop is not read; qml.from_qasm3"),
        ('include "mine.inc";', "include 'mine.inc': only qelib1.inc"),
        ("OPENQASM 2.0;\nqreg q[2];\nh q[0]\nx q[1];", "line 4: "),
        ("gate a q { b q; } gate b q { a q; } qubit q;\na q;", "gate 'a' is not known"),
        (" ", "program: the program is empty"),
        ("hello", "line 1: "),
    ],
)  # fmt: skip
def test_bad_programs_are_one_line(text, message, capfd):
    with pytest.raises(UserError, match=message) as error:
        from_qasm(text)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_bad_output_is_one_line():
    with pytest.raises(UserError, match="version=4; OpenQASM 2 or 3"):
        to_qasm([qml.X(0)], version=4)
    with pytest.raises(UserError, match=r"OpenQASM needs wires 0 \.\. n - 1"):
        to_qasm([qml.X("a")])
    with pytest.raises(UserError, match="num_qubits=2, but wire 4 is used"):
        to_qasm([qml.X(4)], num_qubits=2)


def test_against_qiskit():
    qasm2 = pytest.importorskip("qiskit.qasm2", reason="qiskit is not installed")
    from qiskit.quantum_info import Operator

    text = 'OPENQASM 2.0; include "qelib1.inc"; qreg q[3]; cu3(0.1,0.2,0.3) q[0],q[2]; rxx(0.4) q[1],q[2]; ch q[2],q[0]; rzz(1.0) q[0],q[1];'
    theirs = (
        Operator(qasm2.loads(text, custom_instructions=qasm2.LEGACY_CUSTOM_INSTRUCTIONS))
        .reverse_qargs()
        .data
    )
    same(unitary(from_qasm(text)), theirs)
