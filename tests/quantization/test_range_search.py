"""Entropies against closed forms, joint searches against brute force, partitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.quantization.code_entropy import (
    code_histogram,
    conditional_entropy,
    entropy,
    soft_entropy,
)
from qlab.quantization.range_search import (
    Cost,
    coordinate_search,
    fixed_partition,
    joint_range_search,
    partition_by_proxy,
    search_cost,
    shuffled_partition,
)

GRID = jnp.array([1.0, 0.9, 0.7, 0.4])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_entropy_of_uniform_codes_is_b_ln_2_and_of_constant_ones_0(bits):
    n = 2**bits
    p = code_histogram(jnp.tile(jnp.arange(n), 3), n)
    assert float(entropy(p)) == pytest.approx(bits * np.log(2), rel=1e-6)
    assert float(entropy(code_histogram(jnp.full(50, n - 1), n))) == 0.0


def test_conditional_entropy_of_codes():
    rng = np.random.default_rng(0)
    q1 = rng.integers(0, 4, 3000)
    q2 = np.where(rng.random(3000) < 0.6, (q1 + 1) % 4, rng.integers(0, 4, 3000))
    joint = np.zeros((4, 4))
    np.add.at(joint, (q1, q2), 1 / 3000)
    want = -(joint * np.log(joint / joint.sum(1, keepdims=True))).sum()
    got = float(conditional_entropy(jnp.asarray(q1), jnp.asarray(q2), 4))
    assert got == pytest.approx(want, rel=1e-5)
    plain = float(entropy(code_histogram(jnp.asarray(q2), 4)))
    assert got < plain - 0.1  # it never exceeds H(q2), and here it tells a lot
    free = float(conditional_entropy(jnp.asarray(q1), jnp.asarray(rng.permutation(q2)), 4))
    assert plain - 0.01 < free <= plain + 1e-6
    assert float(conditional_entropy(jnp.asarray(q1), jnp.asarray(3 - q1), 4)) == 0.0
    assert float(conditional_entropy(jnp.asarray(q1), jnp.asarray(q1 // 2), 4)) == 0.0
    with pytest.raises(ValueError, match="do not pair up"):
        conditional_entropy(jnp.zeros(3), jnp.zeros(4), 2)


def test_soft_entropy_is_that_of_the_histogram_on_codes_and_has_its_gradient():
    rng = np.random.default_rng(1)
    q = rng.integers(0, 8, (40, 3))
    lo, hi = jnp.array([-1.0, 0.0, 2.0]), jnp.array([2.5, 7.0, 2.7])
    x = lo + q * (hi - lo) / 7
    soft = jax.jit(lambda x, lo, hi: soft_entropy(x, lo, hi, jnp.float32(8), room=16))
    want = float(entropy(code_histogram(jnp.asarray(q), 8)))
    assert float(soft(x, lo, hi)) == pytest.approx(want, rel=1e-5)
    assert float(soft(x + 100, lo, hi)) == pytest.approx(0.0, abs=1e-6)  # all on the last code
    y = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
    dense = jnp.maximum(0, 1 - jnp.abs((y + 3) / 6 * 7 - jnp.arange(8)[:, None, None]))
    assert float(soft(y, -3.0, 3.0)) == pytest.approx(float(entropy(dense.mean((1, 2)))), rel=1e-5)
    grad, step = jax.grad(soft)(y, -3.0, 3.0), 1e-3
    for i in ((0, 0), (3, 2)):
        moved = [soft(y.at[i].add(s), -3.0, 3.0) for s in (step, -step)]
        assert float(grad[i]) == pytest.approx(float(moved[0] - moved[1]) / 2 / step, abs=2e-3)


def rough(i, y, share):
    """A layer with no structure to help a search; it depends on its place."""
    return jnp.sin(5 * y * share + i) + share * jnp.cos(3 * y)


def loss(y):
    return ((y - 0.3) ** 2).mean()


def by_hand(x, shares):
    for i, share in enumerate(shares):
        x = rough(i, x, share)
    return float(loss(x))


@pytest.fixture(scope="module")
def searches():
    joint = jax.jit(lambda x, n: joint_range_search(rough, x, loss, GRID, n, 4))
    descent = jax.jit(lambda x, n, start: coordinate_search(rough, x, loss, GRID, start, n))
    return joint, descent


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_joint_search_is_brute_force_and_no_other_search_is_better(searches, length):
    joint, descent = searches
    for seed in range(3):
        x = jax.random.normal(jax.random.key(seed), (6,))
        table = {s: by_hand(x, s) for s in itertools.product(GRID.tolist(), repeat=length)}
        found = joint(x, length)
        best = min(table.values())
        assert float(found.loss) == pytest.approx(best, rel=1e-4, abs=1e-6)
        chosen = tuple(found.shares[:length].tolist())
        assert table[chosen] == pytest.approx(best, rel=1e-4, abs=1e-6)
        assert found.shares[length:].tolist() == [1.0] * (4 - length)
        start = jnp.ones(4)
        other = descent(x, length, start)
        assert best <= float(other.loss) + 1e-6
        assert float(other.loss) <= table[(1.0,) * length] + 1e-6  # nor worse than its start
        assert float(other.loss) == pytest.approx(
            table[tuple(other.shares[:length].tolist())], rel=1e-4, abs=1e-6
        )


def test_coordinate_search_is_written_out(searches):
    x, shares = jax.random.normal(jax.random.key(9), (6,)), [1.0, 1.0, 1.0]
    best = by_hand(x, shares)
    for _ in range(2):
        for i in range(3):
            for share in GRID.tolist():
                tried = [*shares[:i], share, *shares[i + 1 :]]
                if by_hand(x, tried) < best - 1e-7:
                    best, shares = by_hand(x, tried), tried
    found = searches[1](x, 3, jnp.ones(4))
    assert float(found.loss) == pytest.approx(best, rel=1e-4)


@pytest.mark.slow
def test_costs_count_every_candidate():
    """Against searches that count their calls on the host."""
    for num, n, exhaustive in ((4, 3, 343), (4, 2, 343), (4, 3, 10)):
        calls = {"layers": 0, "blocks": 0}

        def counted(i, y, share, calls=calls):
            jax.debug.callback(lambda: calls.update(layers=calls["layers"] + 1))
            return rough(i, y, share)

        x, grid = jnp.ones(2), GRID[:num]
        if num**n <= exhaustive:
            joint_range_search(counted, x, loss, grid, n, n).loss.block_until_ready()
        else:
            coordinate_search(counted, x, loss, grid, jnp.ones(n), n).loss.block_until_ready()
        jax.effects_barrier()
        cost = search_cost(num, n, exhaustive=exhaustive)
        assert cost.layers == calls["layers"]
    assert search_cost(7, 3) + Cost(1, 2) == Cost(344, 401)
    assert search_cost(7, 1).blocks == 7


def test_partitions():
    proxy = [2.0, 2.0, 0.5, 2.0, 2.0, 2.0, 2.0, 0.1]
    assert partition_by_proxy(proxy) == ((0, 2), (3, 5), (6, 7))
    assert partition_by_proxy(proxy, max_len=2) == ((0, 1), (2, 2), (3, 4), (5, 6), (7, 7))
    assert partition_by_proxy(proxy, tau=2.0) == fixed_partition(8, 1)
    assert partition_by_proxy(proxy, tau=0.0) == fixed_partition(8, 3)
    assert partition_by_proxy([1.0]) == ((0, 0),)
    blocks = partition_by_proxy(proxy)
    seen = {shuffled_partition(blocks, jax.random.key(i)) for i in range(20)}
    assert len(seen) == 3  # lengths 3, 3, 2 in any order
    for other in seen:
        assert [k for i, j in other for k in range(i, j + 1)] == list(range(8))
        assert sorted(j - i for i, j in other) == [1, 2, 2]
    for bad in ([], [np.nan], [[1.0]]):
        with pytest.raises(ValueError, match="no finite number for each layer"):
            partition_by_proxy(bad)
    with pytest.raises(ValueError, match="max_len=0"):
        partition_by_proxy(proxy, max_len=0)
    with pytest.raises(ValueError, match="blocks of 0 layers"):
        fixed_partition(3, 0)
