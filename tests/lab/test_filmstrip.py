"""Profiles and filmstrips on a page: what is drawn, what is said, what odd data does."""

import numpy as np
import pytest

from qlab.lab import aggregates, filmstrip, stats
from qlab.lab.experiment import Figure, Metric
from qlab.lab.figures import figure_plots


def rows(scores):
    """results.jsonl of {arm: {key: values}}."""
    return [
        dict(arm=arm, task=stats.task_of(key), metric=stats.metric_of(key), seed=i, value=v)
        for arm, by_key in scores.items()
        for key, values in by_key.items()
        for i, v in enumerate(values)
    ]


SCORES = {
    "a": {"x/score": [0.9, 1.0, 0.8], "y/score": [0.7, 0.6, 0.9]},
    "b": {"x/score": [0.1, 0.3, 0.2], "y/score": [0.3, 0.2, 0.1]},
    "c": {"x/score": [0.5, 0.5, 0.5]},
}


def profile(figure, scores=SCORES, **metrics):
    return figure_plots(figure, {}, {}, stats.collect(rows(scores)), list(scores), metrics)


def test_a_profile_pools_the_tasks_of_the_arms_that_have_all():
    (plot,), why = profile(Figure("Profiles", "profile", "score"))
    assert not why
    assert [arm for arm, *_ in plot.legend] == ["a", "b"]
    c = aggregates.interval(aggregates.iqm, [np.array(v) for v in SCORES["a"].values()])
    assert f"a {stats.format_span(c.mean, c.low, c.high)}" in plot.note
    assert "of 6 runs" in plot.note
    assert "Probability that a run of a beats one of b 1 [1, 1]" in plot.note
    (plot,), _ = profile(Figure("Profiles", "profile", "score", tasks=("x",)))
    assert [arm for arm, *_ in plot.legend] == ["a", "b", "c"]


def test_a_profile_of_losses_is_the_share_below():
    (plot,), _ = profile(Figure("Profiles", "profile", "score"), score=Metric("", "lower"))
    assert "below" in plot.svg
    assert "a run of b beats one of a 1 [1, 1]" in plot.note


def test_a_profile_without_runs_says_so():
    apart = {"a": {"x/score": [1.0]}, "b": {"y/score": [1.0]}}
    for figure, scores in (
        (Figure("P", "profile", "score", tasks=("z",)), SCORES),
        (Figure("P", "profile", "score"), apart),
    ):
        drawn, why = profile(figure, scores)
        assert not drawn
        assert why == "P: no arm has score on all tasks"
    (plot,), _ = profile(Figure("P", "profile", "score"), {"a": {"score": [1.0, 1.0]}})
    assert "a 1 [1, 1]" in plot.note
    (plot,), _ = profile(
        Figure("P", "profile", "score"), {"a": {"score": [1.0]}, "b": {"score": [0.0]}}
    )
    assert plot.note == "Interquartile mean [95 % bootstrap] of 1 runs: a 1, b 0."


def strip(frames, ended=None):  # a limb that grows, over a ground
    film = np.zeros((frames, 2, 5))
    film[..., 2] = 1
    film[:, 0] = 0, 0, 2, 0, filmstrip.LOOKS.index("ground")
    film[:, 1, 3] = np.arange(frames)
    film[:, 1, 4] = filmstrip.LOOKS.index("limb")
    film[ended:, :, 4] = 0 if ended is not None else film[ended:, :, 4]
    return film


def film_figure(**arrays):
    figure = Figure("Film", "filmstrip", "film", "film_step")
    arms = list(arrays)
    return figure_plots(figure, {}, {a: {"t/film": v, "t/film_step": np.array([[0, 10.0, 20, 30]])} for a, v in arrays.items()}, {}, arms)  # fmt: skip


def test_a_strip_an_arm_of_the_first_seed_until_the_episode_ends():
    stands, falls = strip(4), strip(4, ended=2)
    (plot,), why = film_figure(stands=np.stack([stands, falls]), falls=falls[None])
    assert not why
    assert (
        plot.alt
        == "Film: stands: still going in all 4 frames; falls: ended after frame 2 (step 10)."
    )
    assert "ended" in plot.svg
    assert ">30<" in plot.svg


def test_every_line_is_drawn_once():
    """Paths of a strip: a ground and a limb in each frame that is shown."""
    count = filmstrip.filmstrip_plot("t", {"a": strip(4)}).svg.count("<path")
    less = filmstrip.filmstrip_plot("t", {"a": strip(4, ended=3)}).svg.count("<path")
    glyphs = filmstrip.filmstrip_plot("t", {"a": strip(4, ended=0)}).svg.count("<path")
    assert count - glyphs == 8
    assert less - glyphs == 6


def test_too_many_strips_and_odd_arrays_say_so():
    many = {f"arm{i}": strip(20)[None] for i in range(10)}
    (plot,), _ = film_figure(**many)
    assert "2 further arms are left out" in plot.note
    assert film_figure(a=np.zeros((1, 3, 2)))[0] == []


@pytest.mark.parametrize("name", ["cartpole", "pendulum", "point_mass"])
def test_the_codes_are_those_of_the_drawings(name):
    import jax
    import jax.numpy as jnp

    from qlab.rl.envs import control, drawings

    for code, look in enumerate(filmstrip.LOOKS):
        assert getattr(drawings, look.upper()) == code
    start = control.ENVS[name].make(control.ENVS[name].physics).start
    x = jax.vmap(start)(jax.random.split(jax.random.key(0), 4))
    frames = np.asarray(drawings.drawn(name, x, jnp.array([True, True, True, False])))
    assert frames.shape[2] == 5
    assert filmstrip.frames_of(frames) == 3
    assert filmstrip.filmstrip_plot("t", {name: frames}).svg.startswith("<svg")


def test_poles_keep_their_length_and_lean_where_their_angle_says():
    import jax.numpy as jnp

    from qlab.rl.envs import drawings

    x0, y0, x1, y1, _ = np.asarray(drawings.cartpole_drawing(jnp.array([0.3, 0.0, 0.2, 0.0])))[3]
    np.testing.assert_allclose([x0, y0], [0.3, 0.0], atol=1e-6)
    np.testing.assert_allclose([x1, y1], [0.3 + np.sin(0.2), np.cos(0.2)], atol=1e-6)
    hanging = np.asarray(drawings.pendulum_drawing(jnp.array([np.pi, 0.0])))[2]
    np.testing.assert_allclose(hanging[:4], [0, 0, 0, -1], atol=1e-6)
