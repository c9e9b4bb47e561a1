"""Pools and graphs, against networkx, plain loops, and their own inverse."""

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import circuit_spec as cs
from qlab.quantum import qas_pool as qp

FIXED = qp.PoolSpec(size=400)
VARIED = qp.PoolSpec(3, (2, 7), (2, 4), 150)


@pytest.fixture(autouse=True)
def x32():
    with jax.enable_x64(False):
        yield


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(FIXED, id="fixed"),
        pytest.param(VARIED, id="varied", marks=pytest.mark.slow),
    ],
)
def drawn(request):
    with jax.enable_x64(False):
        spec = request.param
        pool = qp.sample_circuits(jax.random.key(3), spec)
        return spec, pool, jax.device_get(qp.encode_pool(pool, spec.num_qubits))


def rows_of(pool, i):
    """[(node, name, qubits)] of the gates of circuit i."""
    out = []
    for g in range(pool.gate.shape[1]):
        code = int(pool.gate[i, g])
        if code:
            qubits = [int(pool.q0[i, g]), int(pool.q1[i, g])][: cs.NUM_QUBITS[code]]
            out.append((g + 1, cs.GATES[code], qubits))
    return out


def graph_by_hand(rows, end, n):
    """Walks every wire from START to END."""
    graph = nx.DiGraph()
    for q in range(n):
        wire = [0] + [node for node, _, qubits in rows if q in qubits]
        if len(wire) > 1:
            nx.add_path(graph, [*wire, end])
    if not rows:
        graph.add_edge(0, end)
    return graph


def test_edges_rows_and_depth_are_those_of_walking_the_wires(drawn):
    spec, pool, graphs = drawn
    n, end = spec.num_qubits, pool.gate.shape[1] + 1
    depths = np.asarray(qp.depth(pool, n))
    for i in range(spec.size):
        rows = rows_of(pool, i)
        want = graph_by_hand(rows, end, n)
        assert {(int(a), int(b)) for a, b in np.argwhere(graphs.adj[i])} == set(want.edges)
        assert set(np.unique(graphs.adj[i])) <= {0.0, 1.0}
        assert depths[i] == nx.dag_longest_path_length(want) - 1
        for node, name, qubits in rows:
            row = graphs.ops[i, node]
            assert row[:13].argmax() == cs.GATES.index(name)
            assert row[:13].sum() == 1
            assert np.flatnonzero(row[13:]).tolist() == sorted(qubits)


def test_each_gate_has_few_parents_start_reaches_all_and_all_reach_end(drawn):
    """Properties 1 and 2 of the card."""
    _spec, pool, graphs = drawn
    live = graphs.live > 0
    assert (np.tril(graphs.adj) == 0).all()  # the order of the gates is a topological one
    into = graphs.adj.sum(1)[:, 1:-1]
    assert (into <= cs.NUM_QUBITS[pool.gate]).all()
    assert (into[live[:, 1:-1]] >= 1).all()
    reach = np.eye(graphs.adj.shape[-1]) + graphs.adj
    for _ in range(5):  # 2^5 steps
        reach = np.minimum(reach @ reach, 1)
    assert (reach[:, 0] > 0)[live].all()
    assert (reach[:, :, -1] > 0)[live].all()
    assert (graphs.adj.sum((1, 2))[~live.all(1)] > 0).all()
    empty = np.where(live[..., None], 0, graphs.ops)
    assert not empty.any()
    assert not np.where(live[:, None], 0, graphs.adj).any()


def test_a_pool_has_what_was_asked_for(drawn):
    spec, pool, _ = drawn
    cs.check_spec(pool, spec.num_qubits)
    assert pool.gate.shape == (spec.size, spec.num_gates[1])
    count = (pool.gate > 0).sum(1)
    assert count.min() >= spec.num_gates[0]
    assert count.max() <= spec.num_gates[1]
    deep = np.asarray(qp.depth(pool, spec.num_qubits))
    assert deep.min() >= spec.depth[0]
    assert deep.max() <= spec.depth[1]
    assert len({np.stack(pool[:3])[:, i].tobytes() for i in range(spec.size)}) == spec.size
    cnot = pool.gate == cs.CNOT
    assert (pool.q1 == (pool.q0 + 1) % spec.num_qubits)[cnot].all()
    assert (pool.q1 == pool.q0)[cs.NUM_QUBITS[pool.gate] == 1].all()
    for code in (cs.CZ, cs.SWAP):  # every other qubit, in both directions
        pairs = set(zip(pool.q0[pool.gate == code], pool.q1[pool.gate == code], strict=True))
        assert len(pairs) == spec.num_qubits * (spec.num_qubits - 1)
    used = pool.angle[pool.gate > 0]
    assert used.min() >= 0
    assert used.max() < 2 * np.pi
    assert abs(used.mean() - np.pi) < 0.15
    again = qp.sample_circuits(jax.random.key(3), spec)
    np.testing.assert_array_equal(again.angle, pool.angle)
    assert not np.array_equal(qp.sample_circuits(jax.random.key(4), spec).gate, pool.gate)


def test_a_graph_is_decoded_to_its_circuit(drawn):
    spec, pool, graphs = drawn
    n = spec.num_qubits
    for i in range(40):
        back = qp.decode_graph(graphs.ops[i], graphs.adj[i])
        np.testing.assert_array_equal(back.gate, pool.gate[i])
        for g in range(len(back.gate)):
            a, b = (int(back.q0[g]), int(back.q1[g])), (int(pool.q0[i, g]), int(pool.q1[i, g]))
            assert a == b or (back.gate[g] in (cs.CZ, cs.SWAP) and a == b[::-1])
    one = jax.tree.map(lambda x: x[:60], pool)
    signed = jax.device_get(qp.encode_pool(one, n, "signed"))
    for i in range(60):
        back = qp.decode_graph(signed.ops[i], signed.adj[i], "signed")
        np.testing.assert_array_equal(back.gate, pool.gate[i])
        np.testing.assert_array_equal(
            np.sort([back.q0, back.q1], 0), np.sort([pool.q0[i], pool.q1[i]], 0)
        )


def test_signed_masks_and_counted_edges():
    spec = cs.circuit_spec([("CNOT", [1, 0]), ("CNOT", [1, 0])])
    g = qp.encode_graph(spec, 3, "signed")
    assert g.ops[1, 13:].tolist() == [1, -1, 0]
    assert g.adj[0, 1] == 2
    assert g.adj[1, 2] == 2
    assert g.adj[2, 3] == 2
    plain = qp.encode_graph(spec, 3)
    assert plain.ops[1, 13:].tolist() == [1, 1, 0]
    assert plain.adj.max() == 1
    assert qp.encode_graph(spec, 3, "none").ops.shape == (4, 13)


@pytest.mark.slow
def test_awkward_circuits():
    none = qp.encode_graph(cs.circuit_spec([], 2), 2)
    assert np.argwhere(np.asarray(none.adj)).tolist() == [[0, 3]]
    assert none.live.tolist() == [1, 0, 0, 1]
    gap = cs.circuit_spec([("H", [0])], 3)
    gap = gap._replace(gate=np.array([0, 4, 0], np.int32))  # an empty slot in front
    assert np.argwhere(np.asarray(qp.encode_graph(gap, 2).adj)).tolist() == [[0, 2], [2, 4]]
    cut = qp.encode_pool(jax.tree.map(lambda x: x[None], gap), 2, terminals=False)
    assert cut.adj.sum() == 0
    assert cut.ops[0, 0].sum() == 3
    types = jnp.array([[0, 4, 12], [0, 0, 12], [4, 4, 12], [0, 12, 12]])
    assert qp.is_valid(types).tolist() == [True, False, False, False]
    assert (
        qp.sample_circuits(
            jax.random.key(0), qp.PoolSpec(1, (3, 3), (0, 3), 5, ("H", "RX"))
        ).q1.max()
        == 0
    )


def test_flat_rows_hold_the_whole_encoding(drawn):
    spec, pool, graphs = drawn
    flat = np.asarray(qp.flat_rows(graphs))
    nodes, n = pool.gate.shape[1] + 2, spec.num_qubits
    assert flat.shape == (spec.size, nodes * (13 + n) + nodes * (nodes - 1) // 2)
    assert flat.sum() == graphs.ops.sum() + graphs.adj.sum()


def test_mean_rows_count_gates_and_qubits(drawn):
    _spec, pool, graphs = drawn
    got = np.asarray(qp.mean_rows(graphs))
    for i in range(20):
        rows = rows_of(pool, i)
        counts = np.zeros(got.shape[1])
        counts[[0, 12]] += 1
        counts[13:] += 2
        for _, name, qubits in rows:
            counts[cs.GATES.index(name)] += 1
            counts[[13 + q for q in qubits]] += 1
        np.testing.assert_allclose(got[i], counts / (len(rows) + 2), atol=1e-6)


def test_bad_input_gets_one_line():
    for change, text in [
        (dict(gate_set=("H", "CX")), "did you mean"),
        (dict(num_qubits=1), "without two-qubit gates"),
        (dict(depth=(4, 2)), "depth="),
        (dict(num_gates=(0, 3)), "num_gates="),
        (dict(size=0), "at least one circuit"),
    ]:
        with pytest.raises(UserError, match=text):
            qp.sample_circuits(jax.random.key(0), FIXED._replace(**change))
    with pytest.raises(UserError, match="mask="):
        qp.row_width(4, "unsinged")
    g = qp.encode_graph(cs.circuit_spec([("H", [0]), ("CNOT", [0, 1])]), 2)
    with pytest.raises(UserError, match="node 1 is H on qubits"):
        qp.decode_graph(g.ops.at[1, 13:].set(1.0), g.adj)
    with pytest.raises(UserError, match="edges are not those"):
        qp.decode_graph(g.ops, g.adj.at[1, 3].set(1.0))
    with pytest.raises(UserError, match="START and the last END"):
        qp.decode_graph(g.ops[::-1], g.adj)


@pytest.mark.slow  # all of its draws
def test_a_pool_that_cannot_be_filled_gets_one_line():
    with pytest.raises(UserError, match="only 6 of 9 different circuits"):
        qp.sample_circuits(jax.random.key(0), qp.PoolSpec(2, (1, 1), (0, 1), 9, ("H", "X", "Y")))
