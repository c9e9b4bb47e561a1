"""The curriculum against its rule in plain Python; lengths against NumPy's negative binomial."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantum import moving_threshold as mt


def plain(xi, rule, ends):
    """The card's words, one episode after another."""
    s = r = 0
    for count, (success, best) in enumerate(ends, 1):
        gap = abs(rule.e_ref - best)
        if success:
            s += 1
            if s >= rule.wins_needed and r < rule.max_shifts and gap < rule.switch:
                xi, s, r = xi - rule.delta / 10, 0, r + 1
        if count % rule.every == 0 and count > 10:
            xi, s, r = gap + rule.delta, 0, 0
        yield xi, s, r


@pytest.mark.parametrize("switch", [np.inf, 0.3])
def test_threshold_follows_the_rule(switch, rng):
    rule = mt.ThresholdRule(-1.0, 5e-3, 20, 2, 3, switch)
    best = np.minimum.accumulate(rng.uniform(-0.9, -0.2, 130))
    wins = rng.random(130) < 0.5
    expected = list(plain(0.9, rule, zip(wins, best, strict=True)))

    def body(cur, x):
        cur = mt.moving_threshold_update(cur, *x)
        return cur, (cur.xi, cur.wins, cur.shifts)

    start = mt.moving_threshold(0.9, rule)
    _, got = jax.lax.scan(body, start, (jnp.asarray(wins), jnp.asarray(best)))
    np.testing.assert_allclose(np.stack(got, 1), expected, atol=1e-12)


def test_ten_shifts_end_at_the_best_error():
    rule = mt.ThresholdRule(-2.0, 1e-3, 12, 1, 10)
    cur = mt.moving_threshold(1.0, rule)
    for _ in range(12):
        cur = mt.moving_threshold_update(cur, jnp.bool_(False), jnp.float64(-1.5))
    assert abs(float(cur.xi) - 0.501) < 1e-12
    for _ in range(11):
        cur = mt.moving_threshold_update(cur, jnp.bool_(True), jnp.float64(-1.5))
    assert abs(float(cur.xi) - 0.5) < 1e-12


def test_a_fixed_threshold_stays():
    cur = mt.moving_threshold(0.4, mt.ThresholdRule(-1.0, every=2, wins_needed=1, moving=False))
    for _ in range(30):
        cur = mt.moving_threshold_update(cur, jnp.bool_(True), jnp.float64(-0.9))
    assert float(cur.xi) == 0.4
    assert int(cur.episodes) == 30


@pytest.mark.parametrize(
    ("d", "n", "p", "least", "draws"),
    [(40, 40, 0.6, 0, 100), (70, 70, 0.573, 25, 1), (6, 6, 0.6, 0, 3)],
)
def test_lengths_are_those_of_numpy(d, n, p, least, draws, rng):
    table = mt.halting_table(d, n, p, least)
    count = 4000
    drawn = np.clip(rng.negative_binomial(n, p, (draws, count)), least, d)
    modes = np.array([np.bincount(col, minlength=d + 1).argmax() for col in drawn.T])
    got = np.asarray(mt.halting_cap(jax.random.key(0), table, draws, count))
    a, b = (np.bincount(x, minlength=d + 1) / count for x in (modes, got))
    # two samples of one distribution: total variation of order sqrt(bins / count)
    assert np.abs(a - b).sum() / 2 < 3 * np.sqrt((d + 1) / count)
    assert least <= got.min() <= got.max() <= d


def test_bad_halting():
    with pytest.raises(UserError, match="p=0"):
        mt.halting_table(6, 6, 0.0)
    with pytest.raises(UserError, match="least=9"):
        mt.halting_table(6, 6, 0.5, 9)
