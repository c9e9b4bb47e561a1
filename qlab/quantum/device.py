"""`qlab.ptm`, a PennyLane device: noisy circuits in Pauli coordinates, in JAX from end to end.

dev = qml.device("qlab.ptm", wires=4, noise="ibm_like")
@qml.qnode(dev)                                     # jax arguments: backprop; jit, vmap and grad as usual
def energy(theta): ...

The state is r f[4^n], r_i = Tr(P_i rho) (qlab.quantum.ptm), over the wires that the circuit uses; float32, or float64
with JAX's x64. A gate acts through its matrix, a channel through its Kraus operators, and after each gate come the
channels of the noise model (qlab.quantum.noise_model). Traced parameters stay traced, so one jit serves all values.
Without jit every operation is dispatched alone: wrap the QNode in jax.jit where speed matters.

Supported
  operations: all with a matrix, on up to 4 wires (QubitUnitary, MultiControlledX and their like on any number; PennyLane
    decomposes others, with a noise model down to 1 and 2 qubits but for gates that the model names); PennyLane's qubit
    channels; StatePrep and BasisState at the start, QubitDensityMatrix anywhere; broadcast parameters of gates (vmapped)
  observables: Pauli words, their sums and products, Hermitian, Projector, Hadamard and products and sums of these;
    SparseHamiltonian without shots and without readout errors
  measurements: expval, var, probs; state and density_matrix (both density matrices), purity, vn_entropy, mutual_info;
    with shots expval, var, probs, sample, counts, and shot vectors. PennyLane defers mid-circuit measurements, on wires
    that are free, where there is no noise.
Not supported, each with one line that says so: backprop outside JAX (autograd and torch get parameter-shift) or with
  shots, postselection, mid-circuit measurements under noise, classical shadows, state measurements with shots, counts
  under jit. Parameters of channels do not broadcast in PennyLane; use jax.vmap. What is traced is not checked (numbers of
  a noise model, an observable for being Hermitian).
Readout errors act on the outcomes of probs, expval, var and shots. A sum's expectation is that of its terms, each Pauli
  string misread in its own basis; anything else is measured in its eigenbasis. state and entropies never see them.
Shots come from `seed` (an int, or a JAX key, which may be traced): the k-th circuit a device runs draws with
  fold_in(seed, k). Inside jit k is fixed when tracing, so there give a key: qml.device(..., seed=key) inside the function.

PennyLane's device test suite (0.45.1) passes with x64, analytic and with 200,000 shots, but for two groups (the commands
are in tests/quantum/test_device_plugin.py): its backprop tests through autograd and torch, refused as said above; and
test_backprop_state, test_BasisRotation, test_FlipSign and test_MottonenStatePreparation_state, which read state() as a
state vector unless "mixed" is in the device's name. Under such a name they pass or are skipped, as for default.mixed.
The suite itself skips what asks for the legacy device interface, for shots or for their absence, for torch or for
qutrits; gates for continuous variables and a custom MeasurementTransform are among its expected failures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pennylane as qml
from jax.core import Tracer
from pennylane.devices import Device, ExecutionConfig
from pennylane.devices import preprocess as pre
from pennylane.devices.modifiers import simulator_tracking, single_tape_support
from pennylane.math import Interface, get_interface
from pennylane.measurements import CountsMP
from pennylane.operation import Channel, StatePrepBase
from pennylane.transforms import split_non_commuting
from pennylane.wires import Wires

from qlab.lab.errors import UserError
from qlab.quantum import measure as qm
from qlab.quantum import noise_model as nm
from qlab.quantum import ptm as pt
from qlab.quantum import ptm_measure as mm

MAX_DIRECT = 4  # wires of a gate that is applied by its matrix although it has a decomposition
BY_MATRIX = (  # these on any number
    "QubitUnitary",
    "ControlledQubitUnitary",
    "DiagonalQubitUnitary",
    "BlockEncode",
    "MultiControlledX",
    "MultiRZ",
)
COPIES = 3  # of the state, alive while a gate is applied
JAX = (Interface.JAX, Interface.JAX_JIT)


@simulator_tracking
@single_tape_support
class PTMDevice(Device):
    """Simulates circuits as Pauli-transfer matrices; the module's docstring says what it supports.

    Args:
      wires: their number or labels; None takes each circuit's own.
      noise: a bundled model's name, a path to a JSON, a mapping of that form or a `NoiseModel`; its numbers may be traced.
      seed: of the shots, an int or a JAX key.
    Raises:
      UserError: a bad noise model, readout errors of wires that are not there, a state that does not fit into memory.
    """

    name = "qlab.ptm"  # pyright: ignore[reportAssignmentType]

    def __init__(
        self,
        wires: Any = None,
        shots: Any = None,
        *,
        noise: str | Path | Mapping | nm.NoiseModel | None = None,
        seed: Any = 0,
    ):
        super().__init__(wires=wires, shots=shots)
        self.noise = nm.read_noise(noise)
        self._key = seed
        self._num_runs = 0
        if self.wires is not None:
            _check_memory(len(self.wires))
            labels = [str(w) for w in self.wires]
            for wire in self.noise.readout_wires:
                if wire not in labels:
                    raise UserError(
                        f"{self.noise.source}: readout of wire {wire}, but the device has {', '.join(labels)}"
                    )

    def supports_derivatives(self, execution_config=None, circuit=None) -> bool:
        """Backprop, of analytic circuits whose parameters are JAX's."""
        if execution_config is None:
            return True
        if execution_config.gradient_method not in ("backprop", "best"):
            return False
        if circuit is not None and circuit.shots:
            return False
        interface = Interface(execution_config.interface)
        if interface is Interface.AUTO and circuit is not None:
            found = get_interface(*circuit.get_parameters(trainable_only=False))
            interface = Interface(found) if found in ("autograd", "torch", "jax") else None
        return interface in (*JAX, Interface.AUTO, Interface.NUMPY, None)

    def setup_execution_config(self, config=None, circuit=None):
        config = config or ExecutionConfig()
        method = getattr(config.mcm_config, "mcm_method", None)
        if method not in (None, "deferred"):
            raise UserError(f"mcm_method={str(method)!r}; qlab.ptm has only 'deferred'")
        backprop = config.gradient_method in ("best", "backprop") and self.supports_derivatives(
            config, circuit
        )
        return replace(
            config,
            gradient_method="backprop" if backprop else config.gradient_method,
            use_device_gradient=backprop,
            grad_on_execution=False,
            convert_to_numpy=config.interface not in JAX,
        )

    def preprocess_transforms(self, execution_config=None):
        config = execution_config or ExecutionConfig()
        noisy = nm.has_gate_noise(self.noise)
        max_wires = 2 if noisy else MAX_DIRECT
        sizes = range(1, max_wires + 1)
        targets = {c.__name__ for c in nm.gate_classes().values() if c.num_wires in sizes}
        targets |= {
            *self.noise.gates,
            *(g for g, _ in self.noise.gates_wires),
            *(() if noisy else BY_MATRIX),
        }

        def is_native(op) -> bool:
            if isinstance(op, Channel) or op.name in ("QubitDensityMatrix", *nm.NO_NOISE_AFTER):
                return True
            if not op.has_matrix or len(op.wires) <= max_wires or nm.knows(self.noise, op.name):
                return op.has_matrix
            return not noisy and (op.name in BY_MATRIX or not op.has_decomposition)

        program = super().preprocess_transforms(config)  # empty
        program.add_transform(_refuse_mid_measurements, self.noise)
        program.add_transform(qml.defer_measurements, allow_postselect=False)
        program.add_transform(
            pre.decompose,
            stopping_condition=is_native,
            target_gates=targets,
            device_wires=self.wires,
            name=self.name,
        )
        if config.gradient_method == "backprop":
            program.add_transform(pre.no_sampling, name=f"backprop + {self.name}")
        program.add_transform(pre.validate_device_wires, self.wires, name=self.name)
        program.add_transform(pre.validate_measurements, name=self.name)
        program.add_transform(
            pre.validate_observables,
            stopping_condition=mm.is_sampled if nm.has_readout(self.noise) else mm.is_measurable,
            stopping_condition_shots=mm.is_sampled,
            name=self.name,
        )
        program.add_transform(_split_for_shots)
        return program

    def execute(self, circuits, execution_config=None):
        """One result per circuit: JAX arrays for JAX parameters, NumPy otherwise."""
        config = execution_config or ExecutionConfig()
        to_jax = config.interface in JAX
        results = []
        for tape in circuits:
            self._num_runs += 1
            key = self._key_of_run() if tape.shots else None
            results.append(_run(tape, self.wires, self.noise, key, to_jax))
        return tuple(results)

    def _key_of_run(self) -> jax.Array:
        seed = self._key
        key = jax.random.key(seed) if isinstance(seed, (int, np.integer)) else seed
        return jax.random.fold_in(key, self._num_runs)


# ---- Before a circuit runs ----------------------------------------------------------------------


@qml.transform
def _refuse_mid_measurements(tape, noise):
    """Deferred, a measurement would become extra gates, each with noise of its own."""
    noisy = nm.has_gate_noise(noise) or nm.has_readout(noise)
    if noisy and any(op.name.startswith("MidMeasure") for op in tape.operations):
        raise UserError("qlab.ptm with noise has no mid-circuit measurements; measure at the end")
    return (tape,), pre.null_postprocessing


@qml.transform
def _split_for_shots(tape):
    """Observables that one run cannot measure together get runs, and shots, of their own."""
    if not tape.shots:
        return (tape,), pre.null_postprocessing
    return split_non_commuting(tape)


def _check_memory(n: int) -> None:
    itemsize = jnp.result_type(float).itemsize
    need = COPIES * itemsize * 4.0**n
    if need < 2**30:
        return
    stats = jax.local_devices()[0].memory_stats() or {}
    have = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > have:
        raise UserError(
            f"{n} wires need {need / 2**30:.3g} GiB ({COPIES} x 4^{n} x {itemsize} bytes), and here are "
            f"{have / 2**30:.3g}; use at most {int(np.log2(have / COPIES / itemsize) / 2)} wires"
        )


# ---- One circuit --------------------------------------------------------------------------------


def _run(tape, device_wires, noise: nm.NoiseModel, key, to_jax: bool):
    """The result PennyLane expects of one tape; batched parameters are vmapped."""
    used = tape.wires
    order = used if device_wires is None else Wires([w for w in device_wires if w in used])
    _check_memory(len(order))

    def simulate(tape, key) -> Any:  # the results, or the samples i[shots, n]
        with jax.default_matmul_precision("highest"):
            r = _final_state(tape, order, noise)
            if not tape.shots:
                read = mm.readout(r, order, noise)
                return tuple(mm.measure(mp, r, read, order, noise) for mp in tape.measurements)
            r = mm.rotate(tape.measurements, r, order)
            probs = pt.z_probabilities(mm.readout(r, order, noise))
        outcome = qm.sample_outcomes(key, jnp.maximum(probs, 0.0), tape.shots.total_shots)
        return (outcome[:, None] >> jnp.arange(len(order) - 1, -1, -1)) & 1

    if tape.batch_size is None:
        out = simulate(tape, key)
    else:
        params = tape.get_parameters(trainable_only=False)
        batched = [i for i, info in enumerate(tape.par_info) if _is_batched(params[i], info)]
        keys = None if key is None else jax.random.split(key, tape.batch_size)

        def one(key, *params):
            return simulate(tape.bind_new_parameters(params, batched), key)

        in_axes = (None if key is None else 0, *[0] * len(batched))
        out = jax.vmap(one, in_axes)(keys, *(jnp.asarray(params[i]) for i in batched))
    if not to_jax:
        out = jax.tree.map(lambda x: x if isinstance(x, Tracer) else np.asarray(x), out)
    if not tape.shots:
        return out[0] if len(out) == 1 else out
    if isinstance(out, Tracer) and any(isinstance(mp, CountsMP) for mp in tape.measurements):
        raise UserError("counts gives a dict, which jit and vmap cannot; use sample or probs there")
    parts = []
    for lower, upper in tape.shots.bins():
        part = tuple(
            mp.process_samples(out[..., lower:upper, :], order) for mp in tape.measurements
        )
        parts.append(part[0] if len(part) == 1 else part)
    return tuple(parts) if tape.shots.has_partitioned_shots else parts[0]


def _is_batched(param, info) -> bool:
    op = info["op"]
    if getattr(op, "batch_size", None) is None:
        return False
    return np.ndim(param) > op.ndim_params[info["p_idx"]]


def _final_state(tape, order: Wires, noise: nm.NoiseModel) -> jax.Array:
    """r f[4^n] after all operations."""
    real, cplx = jnp.result_type(float), jnp.result_type(complex)
    r, after = pt.zero_state(len(order), real), {}
    for op in tape.operations:
        wires = tuple(order.index(w) for w in op.wires)
        if isinstance(op, StatePrepBase):
            psi = jnp.asarray(op.state_vector(wire_order=op.wires), cplx).reshape(-1)
            r = pt.prepare(r, pt.ptm_of_density(jnp.outer(psi, psi.conj())).astype(real), wires)
        elif op.name == "QubitDensityMatrix":
            rho = jnp.asarray(op.data[0], cplx)
            r = pt.prepare(r, pt.ptm_of_density(rho).astype(real), wires)
        elif isinstance(op, Channel):
            kraus = jnp.stack([jnp.asarray(k, cplx) for k in op.kraus_matrices()])
            r = mm.apply_kraus(r, kraus, wires)
        elif wires:  # a global phase has none
            if op.has_matrix and op.name not in nm.NO_NOISE_AFTER:
                matrix = jnp.asarray(op.matrix(), cplx)
                r = mm.apply_kraus(r, matrix[None], wires)
            labels = tuple(map(str, op.wires)) if noise.gates_wires else ()
            if (place := (op.name, len(wires), labels)) not in after:
                after[place] = nm.ptm_after(noise, *place)
            if after[place] is not None:
                r = mm.apply_ptm(r, after[place].astype(real), wires)
    return r
