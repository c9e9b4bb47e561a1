"""Circuits on a page: where gates stand, what a reader hears, what odd data does."""

import numpy as np
import pytest

from qlab.lab import circuit_plot as cp
from qlab.lab.experiment import Figure
from qlab.lab.figures import figure_plots


def rows(*gates):
    out = np.zeros((len(gates), 6))
    for row, (name, q0, q1, *angles) in zip(out, gates, strict=True):
        row[:3] = cp.GATES.index(name), q0, q1
        row[3 : 3 + len(angles)] = angles
    return out


BELL = rows(("H", 0, 0), ("CNOT", 0, 1), ("", 0, 0), ("RZ", 1, 1, 0.5))


def test_the_codes_are_those_of_circuits_as_data():
    from qlab.quantum import circuit_spec

    assert cp.GATES == circuit_spec.GATES
    assert {
        g: n for g, n in zip(circuit_spec.GATES, circuit_spec.NUM_ANGLES, strict=True) if n
    } == cp.ANGLES


def test_gates_stand_left_packed_and_never_on_a_line_that_crosses_them():
    placed = cp.columns(
        rows(("CNOT", 3, 0), ("X", 1, 1), ("X", 2, 2), ("CZ", 1, 2), ("SWAP", 0, 3))
    )
    assert [at for at, _ in placed] == [0, 1, 1, 2, 3]


def test_every_gate_is_drawn_and_told():
    circuits = {g: rows((g, 1, 1 if n == 1 else 0, 0.5, 1, 7)) for g, n in kinds()}
    for gate, circuit in circuits.items():
        plot = cp.circuit_plot("found", {gate: circuit})
        assert f"{gate} (1 gates)" in plot.svg
        assert gate in plot.alt
    assert "U3(0.5, 1, 0.72) on 1" in cp.circuit_plot("t", {"a": circuits["U3"]}).alt


def kinds():
    from qlab.quantum.circuit_spec import GATES, NUM_QUBITS

    return list(zip(GATES, NUM_QUBITS, strict=True))[1:]


def test_long_and_empty_circuits_and_too_many_say_so():
    long = rows(*[("X", 0, 0)] * 30)
    plot = cp.circuit_plot("t", {f"arm{i}": long for i in range(6)})
    assert "24 gates beyond column 24 are left out. 2 further circuits" in plot.note
    assert "no gates" in cp.circuit_plot("t", {"a": np.zeros((3, 6))}).alt


@pytest.mark.parametrize("bad", [np.zeros((2, 3)), np.zeros((2, 3, 5))])
def test_a_figure_takes_the_first_seed_of_each_arm(bad):
    figure = Figure("Found", "circuit", "circuit")
    arrays = {"a": {"t/circuit": np.stack([BELL, 0 * BELL])}, "b": {"t/circuit": bad}}
    (plot,), why = figure_plots(figure, {}, arrays, {}, ["a", "b"])
    assert plot.alt == "Found: a: H on 0, CNOT on 0 and 1, RZ(0.5) on 1."
    assert not why
    assert not figure_plots(figure, {}, {"b": {"t/circuit": bad}}, {}, ["b"])[0]
