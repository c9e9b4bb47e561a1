"""Peers, many instances at once and growing action spaces in the search bench: the same work, checked first."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.benches import search, search_growth, search_peers, search_together
from qlab.benches.kernel_peers import Absent
from qlab.benches.measure import find
from qlab.search import search_many
from qlab.search.domains import domain
from qlab.search.domains.sliding import goal_state, manhattan, sliding
from qlab.search.plan import make_plan

FAR = np.asarray(manhattan(4)).reshape(16, 16)
SMALL = {
    "batches": (50,), "peer_batches": (50,), "parts": (), "max_nodes": 1 << 14, "run_s": 0.01,
    "python_nodes": 400, "peer_nodes": 600, "repetitions": 2, "budget_s": 0.1, "together": (),
    "macro_depths": (),
}  # fmt: skip


def scrambled(rng, num):
    s = jnp.tile(goal_state(4), (num, 1))
    move = jax.jit(jax.vmap(sliding(4).next_state))
    for actions in rng.integers(0, 4, (60, num)):
        s = move(s, jnp.asarray(actions))
    return s


class TestDeepxube:
    @pytest.fixture(params=["astar", "qstar"])
    def mode(self, request):
        return request.param

    @pytest.mark.parametrize("batch", [1, 20])
    def test_it_finds_what_qlab_finds(self, mode, batch, rng):
        """Both stop when nothing cheaper is left, so costs are the optimum; ties break in other orders."""
        try:
            run = search_peers.deepxube(mode, FAR, batch)
        except Absent as e:
            pytest.skip(str(e))
        starts = scrambled(rng, 8)
        ours = search_many(
            search.puzzle(), search.heuristic(mode), starts, mode=mode, batch=batch, stop="bound",
            max_nodes=1 << 14,
        )  # fmt: skip
        found = [run(s, 10**6) for s in np.asarray(starts)]
        assert [cost for *_, cost in found] == ours.cost.tolist()
        generated, stored = np.array(found).sum(0)[:2]
        assert 0.5 < generated / ours.num_generated.sum() < 2
        assert 0.5 < stored / ours.num_nodes.sum() < 2

    def test_it_ends_at_the_limit(self, mode):
        try:
            run = search_peers.deepxube(mode, FAR, 10)
        except Absent as e:
            pytest.skip(str(e))
        generated, stored, cost = run(search.unsolvable_start(), 500)
        assert (500 <= generated < 500 + 40, cost) == (True, -1)
        assert stored < generated

    def test_an_absent_package_is_named_with_its_remedy(self, monkeypatch):
        def gone(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name="clingo.solving")

        monkeypatch.setattr(search_peers.importlib, "import_module", gone)
        with pytest.raises(Absent, match=r"^clingo is not installed \(pip install clingo\)$"):
            search_peers.deepxube("astar", FAR, 1)


class TestPeerNumbers:
    def measured(self, monkeypatch, mode, run):
        monkeypatch.setattr(search_peers, "deepxube", run)
        return search.measure(
            {**search.settings(True), **SMALL, "modes": (mode,)}, lambda text: None
        )

    def test_absent(self, monkeypatch):
        def gone(mode, far, batch):
            raise Absent("nowhere to be had")

        numbers = self.measured(monkeypatch, "astar", gone)
        for arm, metric in (("deepxube", "generated_per_s"), ("qlab", "of_deepxube")):
            n = find(numbers, arm, f"astar_b50/{metric}")
            assert (n.status, n.note) == ("absent", "nowhere to be had")
        assert "deepxube" not in search.summary(numbers)

    def test_present(self, monkeypatch):
        asked = []

        def made(mode, far, batch):
            np.testing.assert_array_equal(far, FAR)
            asked.append((mode, batch))
            return search.python_astar

        numbers = self.measured(monkeypatch, "qstar", made)
        assert asked == [("qstar", 50)]
        ours, theirs = (
            find(numbers, arm, "qstar_b50/generated_per_s").values for arm in ("qlab", "deepxube")
        )
        times = find(numbers, "qlab", "qstar_b50/of_deepxube")
        assert times.values == tuple(a / b for a, b in zip(ours, theirs, strict=True))
        assert f"qstar_b50 {times.median:.3g} times deepxube" in search.summary(numbers)

    def test_one_that_solves_the_unsolvable_is_refused(self, monkeypatch):
        monkeypatch.setattr(search_peers, "deepxube", lambda *_: lambda start, limit: (40, 9, 12))
        plan = make_plan(search.puzzle(), jax.ShapeDtypeStruct((16,), jnp.uint8), "astar")
        with pytest.raises(RuntimeError, match="solved an unsolvable state at cost 12"):
            search.peer(plan, search.unsolvable_start(), 100)()

    def test_goals_are_about_what_is_measured(self):
        for quick in (True, False):
            s = search.settings(quick)
            names = [g.left[1] for g in search.goals(s)]
            batch = max(s["peer_batches"])
            assert names[2:] == [f"astar_b{batch}/of_deepxube", f"qstar_b{batch}/of_deepxube"]
            assert batch in s["batches"]


class TestTogether:
    @pytest.mark.parametrize("case", search_together.CASES)
    def test_all_costs_are_exact_and_rates_divide(self, case, monkeypatch):
        ways, exact = search_together.contestants(case, 5)
        assert exact.min() > 10
        for call in ways.values():
            np.testing.assert_array_equal(call(), exact)
        monkeypatch.setattr(search_together, "contestants", lambda *_: (ways, exact))
        numbers = search_together.measure(case, 5, 3, 1.0)
        ours, theirs, times = (
            find(numbers, arm, f"{case}_5/{metric}").values
            for arm, metric in (
                ("qlab", "searches_per_s"), ("one_by_one", "searches_per_s"), ("qlab", "of_one_by_one"),
            )
        )  # fmt: skip
        assert times == tuple(a / b for a, b in zip(ours, theirs, strict=True))

    def test_a_wrong_cost_is_refused(self, monkeypatch):
        exact = np.array([3.0, 4.0])
        ways = {"qlab": lambda: exact, "one_by_one": lambda: exact + [0, 2]}
        monkeypatch.setattr(search_together, "contestants", lambda *_: (ways, exact))
        with pytest.raises(RuntimeError, match="one_by_one: 1 of 2 costs are not exact"):
            search_together.measure("long", 2, 3, 1.0)


@pytest.mark.slow
def test_both_searches_of_a_growing_action_space_and_their_ratios(monkeypatch):
    """On Lights Out 4 x 4: A* makes 16 children a pop, Q* one and at least one a step of its path."""
    actions, ways = search_growth.contestants(1, 100, 6)
    d = domain("lightsout4")
    exact = np.asarray(d.distance(jnp.asarray(d.instances(0, 6))))
    astar, qstar = ways["astar"](), ways["qstar"]()
    assert actions == 16
    assert all(r.solved.all() and (r.cost >= exact).all() for r in (astar, qstar))
    assert (astar.num_generated % 16 == 0).all()
    assert (astar.num_generated >= 16 * exact).all()
    assert (qstar.num_generated >= qstar.cost).all()
    assert (qstar.num_generated == qstar.num_iters).all()
    monkeypatch.setattr(search_growth, "contestants", lambda *_: (actions, ways))
    numbers = search_growth.measure(1, 100, 6, 3, 1.0)
    ratio = find(numbers, "astar", "actions_16/nodes_over_qstar").values
    np.testing.assert_allclose(
        ratio, astar.num_generated.sum() / qstar.num_generated.sum(), rtol=1e-6
    )
    assert find(numbers, "qstar", "actions_16/solved").values == (100, 100, 100)
