"""The contestants themselves: the same work for all, clocks that add up."""

import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.benches import runner, runner_parts, search, search_parts, startup
from qlab.benches.measure import Number
from qlab.lab import checkpoint, loop
from qlab.lab.experiment import Experiment, Phase
from qlab.search.domains.sliding import goal_state, sliding
from qlab.search.plan import make_plan

ROOT = Path(__file__).resolve().parents[2]
U8 = jax.ShapeDtypeStruct((16,), jnp.uint8)


class TestRunner:
    def test_bare_loop_does_the_steps_of_the_runner(self):
        init, step = runner_parts.dense(8, 2)()
        fresh, run = runner.bare(init, step, 2)
        states, metrics = run(fresh(), np.int32(7))
        phase = Phase("train", 7, step)
        carry = loop.begin(fresh(), phase, 2, np.full(2, -1, np.int32))
        program = loop.compile_phase(phase, loop.place(carry, 2, "vmap"), 2, "vmap")
        for now, _ in loop.run_phase(phase, loop.place(carry, 2, "vmap"), program, 7):
            carry = now
        x = np.ones((8, 8), np.float32)
        w = np.asarray(fresh().w[1])
        for _ in range(14):
            x = np.tanh(x @ w)
        np.testing.assert_allclose(states.x[1], x, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(carry.states.x[1], x, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["loss"][1], (x**2).mean(), rtol=1e-4)

    def test_clocks_time_the_loop_and_put_back_what_they_wrap(self):
        before = loop.compile_phase, loop.run_phase, checkpoint.save

        def step(s):
            return s + 1, {"loss": jnp.float32(0)}

        exp = Experiment(lambda _: jnp.int32(0), lambda s: {"n": s}, (Phase("t", 40, step),))
        start = time.perf_counter()
        t = runner_parts.run_arm(exp, 2, log_points=8)
        assert (loop.compile_phase, loop.run_phase, checkpoint.save) == before
        assert t["windows"] == 8
        assert 0 < t["chunks"] < t["loop"] < time.perf_counter() - start
        assert len(t["saves"]) == 1  # the one at the end of the arm

    def test_saves_of_a_run_are_all_counted(self):
        def step(s):
            jax.debug.callback(lambda: time.sleep(0.02))
            return s + 1, {"loss": jnp.float32(0)}

        exp = Experiment(lambda _: jnp.int32(0), lambda s: {"n": s}, (Phase("t", 30, step),))
        t = runner_parts.run_arm(exp, 1, log_points=30, checkpoint_every_s=0.1)
        assert len(t["saves"]) >= 2
        assert sum(t["saves"][:-1]) < t["loop"]

    def test_overhead_of_a_phase(self):
        parts = [
            Number("program", "step_overhead", (0.2, 0.5, 9.0)),
            Number("runner", "window_ms", (0.3, 0.1)),
        ]
        assert runner.over_phase(parts, 100, 10.0).values == pytest.approx((0.8, 0.6))
        assert runner.over_phase(parts, 100, 1.0).values == pytest.approx((3.5, 1.5))


class TestSearch:
    def states(self, rng, num):
        p = search.puzzle()
        s = jnp.tile(goal_state(4), (num, 1))
        move = jax.jit(jax.vmap(p.next_state))
        for actions in rng.integers(0, 4, (60, num)):
            s = move(s, jnp.asarray(actions))
        return p, s

    def test_heuristics_are_the_manhattan_distance_and_that_of_children(self, rng):
        p, s = self.states(rng, 50)
        enc = jax.vmap(p.encode)(s)

        def plain(state):
            cells = [(c, t) for c, t in enumerate(np.asarray(state).tolist()) if t]
            return sum(abs(c // 4 - (t - 1) // 4) + abs(c % 4 - (t - 1) % 4) for c, t in cells)

        h = search.heuristic("astar")(enc)
        assert h.tolist() == [plain(x) for x in np.asarray(s)]
        q = search.heuristic("qstar")(enc)
        move = jax.jit(jax.vmap(p.next_state, (0, None)))
        for a in range(4):
            children = np.asarray(move(s, a))
            assert np.asarray(q)[:, a].tolist() == [1 + plain(x) for x in children]

    def test_the_start_has_no_solution(self):
        def parity(s):  # of the permutation, together with the blank's row: unchanged by moves
            tiles = [t for t in s if t]
            inversions = sum(a > b for i, a in enumerate(tiles) for b in tiles[i:])
            return (inversions + list(s).index(0) // 4) % 2

        assert parity(search.unsolvable_start().tolist()) != parity(goal_state(4).tolist())

    def test_plain_python_finds_what_qlab_finds(self, rng):
        from qlab.search import search_many

        p, s = self.states(rng, 8)
        ours = search_many(p, search.heuristic("astar"), s, mode="astar", max_nodes=1 << 14)
        for state, cost, nodes in zip(np.asarray(s), ours.cost, ours.num_nodes, strict=True):
            generated, stored, found = search.python_astar(state, 10**6)
            assert found == int(cost)
            assert generated % 4 == 0
            assert 0.2 < stored / int(nodes) < 5  # ties are broken in other orders

    def test_rates_are_those_of_a_search_that_met_its_limit(self):
        start = search.unsolvable_start()
        assert search.python_astar(start, 400)[::2] == (400, -1)
        plan = make_plan(search.puzzle(), U8, "astar", batch=1, max_nodes=4096)
        rates = search.searching(search.puzzle(), plan, start)[0](400)
        assert rates["generated_per_s"] * rates["search_ns"] == pytest.approx(1e9)
        share = rates["stored_per_s"] / rates["generated_per_s"]
        assert share == pytest.approx(search.python_astar(start, 400)[1] / 400, rel=0.1)

    def test_expansion_makes_all_children(self, rng):
        from qlab.search.table import pack, unpack

        p, s = self.states(rng, 5)
        for mode, num in (("astar", 4), ("qstar", 1)):
            plan = make_plan(p, U8, mode, batch=5)
            words, cost = search_parts.expand(p, plan, pack(s), jnp.int32(2))
            children = unpack(words, U8).reshape(5, num, 16)
            for a in range(num):
                want = jax.jit(jax.vmap(p.next_state, (0, None)))(s, a if num == 4 else 2)
                np.testing.assert_array_equal(children[:, a], want)
            assert cost.tolist() == [1.0] * (5 * num)

    def test_moves_are_those_of_the_puzzle(self):
        s = jnp.asarray(1 - np.eye(16), jnp.uint8)  # the blank in every cell
        over_actions = jax.vmap(sliding(4).next_state, (None, 0))
        children = jax.jit(jax.vmap(over_actions, (0, None)))(s, jnp.arange(4))
        np.testing.assert_array_equal(children.argmin(-1), search.MOVES)

    @pytest.mark.slow
    def test_parts_are_all_timed(self):
        p = search.puzzle()
        plan = make_plan(p, U8, "qstar", batch=20, max_nodes=4000)
        numbers = search_parts.measure(
            p, plan, search.heuristic("qstar"), search.unsolvable_start(), 3
        )
        assert {n.name for n in numbers} == {
            f"{x}_ns" for x in ("expand", "heuristic", "table", "pop", "push")
        }
        assert all(len(n.values) == 3 and np.isfinite(n.values).all() for n in numbers)


class TestStartup:
    def test_stages_add_up(self):
        parts = startup.stages(100.0, {"jax": 103.5, "python": 101.0, "qlab": 101.5})
        assert parts == {"python": 1.0, "qlab": 0.5, "jax": 2.0, "total": 3.5}

    def test_a_run_is_traced_to_its_first_step_and_left_there(self, toy, tmp_path):
        got = startup.traced(f"{toy}:smoke", tmp_path / "cache")
        assert set(got) == {*startup.STAGES, "total"}
        assert sum(v for k, v in got.items() if k != "total") == pytest.approx(got["total"])
        assert min(got.values()) >= 0

    def test_a_study_that_cannot_start_is_one_line(self, tmp_path):
        with pytest.raises(RuntimeError, match="error: no config 'nonsense'"):
            startup.traced("nonsense", tmp_path)

    def test_the_process_keeps_compilations(self, tmp_path, monkeypatch):
        monkeypatch.setenv("QLAB_COMPILATION_CACHE", "off")
        env = startup._environment(tmp_path)
        assert "QLAB_COMPILATION_CACHE" not in env
        assert env["QLAB_CACHE"] == str(tmp_path)
        code = "import qlab.bench"
        assert not subprocess.run([sys.executable, "-c", code], env=env, cwd="/").returncode
