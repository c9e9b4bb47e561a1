"""Noise models by gate name, read from a small JSON: which channels follow which gate, and how outcomes are misread.

{"about": "where the numbers come from",
 "default": {"1": [channel, ...], "2": [channel, ...]},       after every gate on 1 or 2 qubits without its own entry
 "gates": {"RZ": [], "CNOT": [{"kind": "depolarizing", "p": 0.01}]},
 "readout": {"default": [P(read 1 | 0), P(read 0 | 1)], "wires": {"3": [0.02, 0.05]}}}

Channels, in their order after the gate:
  depolarizing p                  a non-identity Pauli on all the gate's qubits together, p in total
and, on each of the gate's qubits alone,
  amplitude_damping gamma         |1> decays to |0>
  phase_damping gamma             X and Y shrink by sqrt(1 - gamma)
  bit_flip p, phase_flip p        X or Z with probability p
  thermal duration t1 t2 excited  relaxation towards the population `excited` (left out: 0) of |1>; any one unit of time
  kraus matrices                  K[m] as [{"re": [[..]], "im": [[..]]}, ...]; 2 x 2 act on each qubit, larger ones on
                                  gates of just that many qubits
Bundled models: `bundled()`; the "about" line of each says which of its numbers are recalled and which are ours.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qlab.lab.errors import UserError, nearest
from qlab.quantum import ptm as pt

FOLDER = resources.files("qlab.quantum") / "noise_models"
NO_NOISE_AFTER = ("Identity", "GlobalPhase", "Barrier", "WireCut", "Snapshot")  # unless named


class Channel(NamedTuple):
    """One channel: its kind and parameters (numbers, or traced arrays, which are not checked)."""

    kind: str
    params: dict[str, Any]


class NoiseModel(NamedTuple):
    """What follows each gate and what misreads each outcome.

    Attributes:
      gates: channels by PennyLane's gate name.
      default: channels by the gate's number of qubits, 1 or 2, for gates that `gates` does not name.
      readout: (P(read 1 | 0), P(read 0 | 1)) of every wire that `readout_wires` does not name.
      readout_wires: the same by wire label, as text.
      source: for error lines.
      gates_wires: channels by (gate name, wire labels as text, in the gate's order); they replace `gates`.
    """

    gates: dict[str, tuple[Channel, ...]] = {}
    default: dict[int, tuple[Channel, ...]] = {}
    readout: tuple[Any, Any] = (0.0, 0.0)
    readout_wires: dict[str, tuple[Any, Any]] = {}
    source: str = "noise"
    gates_wires: dict[tuple[str, tuple[str, ...]], tuple[Channel, ...]] = {}


class _Kind(NamedTuple):
    """Parameters with their upper bounds (None: not a plain number), whether it acts on all qubits jointly, the map."""

    params: dict[str, float | None]
    joint: bool
    ptm: Callable[..., jax.Array]


def _flip(x, y, z):
    """A Pauli with probability p shrinks the other two by 1 - 2 p; x, y, z say which shrink."""

    def ptm(p, k):
        p = jnp.asarray(p) * 1.0
        return pt.ptm_shrink(1 - 2 * x * p, 1 - 2 * y * p, 1 - 2 * z * p)

    return ptm


def _phase_damping(gamma, k):
    keep = jnp.sqrt(1 - jnp.asarray(gamma))
    return pt.ptm_shrink(keep, keep, jnp.ones_like(keep))


def _thermal(duration, t1, t2, k, excited=0.0):
    duration, t1, t2 = (jnp.asarray(x) * 1.0 for x in (duration, t1, t2))
    return pt.ptm_thermal(duration, t1, t2, excited)


KINDS = {
    "depolarizing": _Kind({"p": 1.0}, True, pt.ptm_depolarizing),
    "amplitude_damping": _Kind({"gamma": 1.0}, False, lambda gamma, k: pt.ptm_damping(gamma)),
    "phase_damping": _Kind({"gamma": 1.0}, False, _phase_damping),
    "bit_flip": _Kind({"p": 1.0}, False, _flip(0, 1, 1)),
    "phase_flip": _Kind({"p": 1.0}, False, _flip(1, 1, 0)),
    "thermal": _Kind(
        {"duration": np.inf, "t1": np.inf, "t2": np.inf, "excited": 1.0}, False, _thermal
    ),
    "kraus": _Kind({"matrices": None}, False, lambda matrices, k: pt.ptm_of_kraus(matrices)),
}


# ---- Reading and checking -----------------------------------------------------------------------


def bundled() -> tuple[str, ...]:
    """Names of the models that come with the package."""
    return tuple(sorted(f.name[:-5] for f in FOLDER.iterdir() if f.name.endswith(".json")))


def read_noise(source: str | Path | Mapping | NoiseModel | None) -> NoiseModel:
    """The checked model of a bundled name, a path to a JSON, a mapping of the same form, or nothing.

    >>> read_noise({"gates": {"RX": [{"kind": "bit_flip", "p": 0.1}]}}).gates["RX"][0].params
    {'p': 0.1}

    Raises:
      UserError: a file that is not there or is no JSON, an unknown key, gate, channel or parameter, a number out of
        range, Kraus operators that do not preserve the trace; always with the place.
    """
    if source is None:
        return NoiseModel()
    if isinstance(source, NoiseModel):
        return source
    if isinstance(source, Mapping):
        return _model(source, "noise")
    path = FOLDER / f"{source}.json" if source in bundled() else Path(source)
    if not path.is_file():
        raise UserError(
            f"noise {str(source)!r} is no file and no model{nearest(str(source), bundled())}"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(
            f"{source}: not JSON ({e}); qlab.quantum.noise_model describes the form"
        ) from e
    return _model(data, str(source))


def _keys(data: Any, valid: tuple[str, ...], where: str) -> None:
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: {data!r:.60} is not a mapping with the keys {', '.join(valid)}")
    for key in data:
        if key not in valid:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), valid)}")


def _model(data: Any, source: str) -> NoiseModel:
    _keys(data, ("about", "default", "gates", "readout"), source)
    default, classes = data.get("default", {}), gate_classes()
    _keys(default, ("1", "2"), f"{source}: default")
    gates = {}
    for name, channels in data.get("gates", {}).items():
        if name not in classes:
            raise UserError(f"{source}: unknown gate {name!r}{nearest(name, tuple(classes))}")
        gates[classes[name].__name__] = _channels(channels, f"{source}: gates.{name}", None)
    readout = data.get("readout", {})
    if not isinstance(readout, Mapping):
        readout = {"default": readout}
    _keys(readout, ("default", "wires"), f"{source}: readout")
    wires = readout.get("wires", {})
    return NoiseModel(
        gates,
        {int(k): _channels(v, f"{source}: default.{k}", int(k)) for k, v in default.items()},
        _pair(readout.get("default", (0.0, 0.0)), f"{source}: readout.default"),
        {str(w): _pair(v, f"{source}: readout.wires.{w}") for w, v in wires.items()},
        source,
    )


@functools.cache
def gate_classes() -> dict[str, type]:
    """PennyLane's gates by every name they have there, aliases too."""
    from pennylane import ops
    from pennylane.operation import Channel as PLChannel
    from pennylane.operation import Operation

    classes = {n: c for n, c in vars(ops).items() if isinstance(c, type)}
    return {
        n: c
        for n, c in classes.items()
        if issubclass(c, Operation) and not issubclass(c, PLChannel) and c is not Operation
    }


def _channels(data: Any, where: str, k: int | None) -> tuple[Channel, ...]:
    if not isinstance(data, (list, tuple)):
        raise UserError(f"{where}: give a list of channels, [] for none")
    return tuple(_channel(c, f"{where}[{i}]", k) for i, c in enumerate(data))


def _channel(data: Any, where: str, k: int | None) -> Channel:
    if not isinstance(data, Mapping) or "kind" not in data:
        raise UserError(f"{where}: {data!r:.60} names no kind; one of {', '.join(KINDS)}")
    params = {name: value for name, value in data.items() if name != "kind"}
    if data["kind"] not in KINDS:
        raise UserError(
            f"{where}: unknown channel {data['kind']!r}{nearest(str(data['kind']), tuple(KINDS))}"
        )
    kind = KINDS[data["kind"]]
    _keys(params, tuple(kind.params), where)
    if missing := [n for n in kind.params if n not in params and n != "excited"]:
        raise UserError(f"{where}: {data['kind']} needs {', '.join(missing)}")
    if data["kind"] == "kraus":
        return Channel("kraus", {"matrices": _kraus(params["matrices"], where, k)})
    for name, value in params.items():
        bound = kind.params[name]
        _check(value, 1.0 if bound is None else bound, f"{where}: {name}")
    if data["kind"] == "thermal":
        t1, t2 = params["t1"], params["t2"]
        if _known(t1) and _known(t2) and not 0 < t2 <= 2 * t1:
            raise UserError(f"{where}: t1={t1}, t2={t2}; relaxation needs 0 < t2 <= 2 t1")
    return Channel(data["kind"], params)


def _known(value: Any) -> bool:
    return not isinstance(value, Tracer)


def _check(value: Any, bound: float, where: str) -> None:
    if not _known(value):
        return
    if (
        isinstance(value, (bool, str))
        or np.ndim(value)
        or not isinstance(value, (int, float, np.generic, jax.Array))
    ):
        raise UserError(f"{where}={value!r:.40} is not a number")
    if not 0.0 <= float(value) <= bound or np.isinf(float(value)):
        what = "a probability, from 0 to 1" if bound == 1.0 else "finite and not negative"
        raise UserError(f"{where}={float(value):g}; it must be {what}")


def _pair(value: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise UserError(f"{where}: {value!r:.60} is not [P(read 1 | 0), P(read 0 | 1)]")
    for flip in value:
        _check(flip, 1.0, where)
    return value[0], value[1]


def _kraus(data: Any, where: str, k: int | None) -> np.ndarray | jax.Array:
    """c[m, 2^q, 2^q], checked for shape and sum K^dagger K = 1 (to 1e-6)."""
    if isinstance(data, Tracer):
        return data
    try:
        ops = np.stack(
            [
                np.asarray(m["re"], float) + 1j * np.asarray(m.get("im", 0.0), float)
                if isinstance(m, Mapping)
                else np.asarray(m, complex)
                for m in data
            ]
        )
    except (TypeError, ValueError, KeyError) as e:
        raise UserError(f"{where}: matrices are no Kraus operators of one shape ({e})") from e
    dim = ops.shape[-1]
    if ops.ndim != 3 or ops.shape[1] != dim or dim < 2 or dim & (dim - 1):
        raise UserError(f"{where}: Kraus operators of shape {ops.shape[1:]}; they are 2^q x 2^q")
    if k is not None and dim not in (2, 2**k):
        raise UserError(f"{where}: {dim} x {dim} Kraus operators after a gate on {k} qubit(s)")
    gap = np.abs(np.einsum("mba,mbc->ac", ops.conj(), ops) - np.eye(dim)).max()
    if not gap < 1e-6:
        raise UserError(
            f"{where}: sum K^dagger K is off the identity by {gap:.2g}; the trace is not preserved"
        )
    return ops


# ---- What the simulator asks --------------------------------------------------------------------


def channels_after(
    model: NoiseModel, name: str, k: int, wires: tuple[str, ...] = ()
) -> tuple[Channel, ...]:
    """The channels after a gate on k qubits; Adjoint(G) counts as G unless it has entries of its own."""
    if name.startswith("Adjoint(") and not knows(model, name):
        name = name[len("Adjoint(") : -1]
    if (name, wires) in model.gates_wires:
        return model.gates_wires[name, wires]
    if name in model.gates:
        return model.gates[name]
    return () if name in NO_NOISE_AFTER else model.default.get(k, ())


def knows(model: NoiseModel, name: str) -> bool:
    """The model has entries for this gate."""
    return name in model.gates or any(gate == name for gate, _ in model.gates_wires)


def has_gate_noise(model: NoiseModel) -> bool:
    tables = (model.gates, model.default, model.gates_wires)
    return any(channels for table in tables for channels in table.values())


def has_readout(model: NoiseModel) -> bool:
    pairs = (model.readout, *model.readout_wires.values())
    return any(not _known(flip) or flip != 0 for pair in pairs for flip in pair)


def ptm_after(
    model: NoiseModel, name: str, k: int, wires: tuple[str, ...] = ()
) -> jax.Array | None:
    """The whole map f[4^k, 4^k] after a gate on k qubits, or None where nothing follows it.

    Raises:
      UserError: Kraus operators on another number of qubits than the gate has.
    """
    total = None
    for kind, params in channels_after(model, name, k, wires):
        size = k if KINDS[kind].joint else 1
        if kind == "kraus":
            matrices = jnp.asarray(params["matrices"])
            size, params = round(np.log2(matrices.shape[-1])), {"matrices": matrices}
        if size not in (1, k):
            raise UserError(
                f"{model.source}: {name} acts on {k} qubits, its Kraus operators on {size}"
            )
        ptm = KINDS[kind].ptm(**params, k=size)
        if size < k:
            ptm = functools.reduce(jnp.kron, [ptm] * k)
        total = ptm if total is None else ptm @ total
    return total


def readout_ptm(model: NoiseModel, wire: Any) -> jax.Array:
    """f[4, 4] of a wire, `ptm.ptm_readout`."""
    flip0, flip1 = model.readout_wires.get(str(wire), model.readout)
    return pt.ptm_readout(jnp.asarray(flip0) * 1.0, jnp.asarray(flip1) * 1.0)
