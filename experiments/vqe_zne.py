"""Zero-noise extrapolation by networks and by classical fits, on the same noisy energies.

Arms are estimators. Curves come from the seed's key alone, so all arms get the same circuits, points and shots;
within one process they are computed once and shared. Errors are in units of sum_j |c_j| of the Hamiltonian.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qlab.lab.experiment import Claim, Experiment, Figure, Metric, Phase
from qlab.quantum import zne, zne_nn, zne_study
from qlab.quantum.noise import FixedErrors

_UNIT = "sum|c|"
METRICS = {
    "median_error": Metric(_UNIT, "lower", "median over circuits of |estimate - E(0)|"),
    "p90_error": Metric(_UNIT, "lower", "90th percentile of the same"),
    "bias": Metric(_UNIT, "lower", "rms error over circuits at infinite shots"),
    "spread": Metric(_UNIT, "lower", "rms change of the estimate that shot noise makes"),
    "mse": Metric(_UNIT + "^2", "lower", "mean squared error"),
    "win_share": Metric("%", "higher", "circuits in which the error is below the raw point's"),
    "net_spread": Metric(_UNIT, "none", "median standard deviation over the ensemble"),
}
_CLASSICAL = (
    *("linear", "quadratic", "cubic", "richardson3", "richardson5", "richardson10"),
    *("exp_fixed", "exp_free", "poly_loo", "folding", "gp"),
)
CLAIMS = (
    Claim("The net beats the raw point in 90 % of VQE circuits, exact values", "abstract, checked form",
          ("nn", "vqe_inf/win_share"), ">=", 90.0),
    Claim("The same at 10^4 shots", "abstract, checked form", ("nn", "vqe_1e4/win_share"), ">=", 90.0),
    Claim("The net is at least as good as the best classical fit, exact values", "ours",
          ("nn", "vqe_inf/median_error"), "<=", (_CLASSICAL, "vqe_inf/median_error"),
          note="expected to fail: E(lam) is a polynomial"),
    Claim("The net is at least as good as the best classical fit, 10^4 shots", "ours",
          ("nn", "vqe_1e4/median_error"), "<=", (_CLASSICAL, "vqe_1e4/median_error")),
    Claim("A net over many circuits beats the best classical fit, 10^4 shots", "ours",
          ("nn_amortised", "vqe_1e4/median_error"), "<=", (_CLASSICAL, "vqe_1e4/median_error"),
          note="it alone gets noise-free labels of random circuits"),
    Claim("... and on random circuits, the kind it was trained on", "ours",
          ("nn_amortised", "random_1e4/median_error"), "<=", (_CLASSICAL, "random_1e4/median_error")),
    Claim("10-point Richardson has less bias than the net", "ours",
          ("richardson10", "vqe_inf/bias"), "<=", ("nn", "vqe_inf/bias")),
    Claim("10-point Richardson has more spread than the net at 10^4 shots", "ours",
          ("richardson10", "vqe_1e4/spread"), ">=", ("nn", "vqe_1e4/spread")),
)  # fmt: skip
FIGURES = (
    Figure("Error at exact values and 10^4 shots", "bars", "median_error", logy=True,
           tasks=("vqe_inf", "vqe_1e4", "random_inf", "random_1e4")),
    Figure("Error against shots", "line", "error_by_shots", "shots", "shots a point",
           "median |error|", logx=True, logy=True),
    Figure("Fitted E(lam) of one VQE circuit, 10^4 shots (raw: the points)", "line", "fitted", "lam", "lam",
           "E / sum|c|", arms=("raw", "linear", "cubic", "richardson3", "exp_fixed", "gp", "nn", "nn_relu")),
    Figure("Training of the nets", "curve", "loss", logy=True),
)  # fmt: skip


class NetState(NamedTuple):
    curves: zne_study.Curves
    nets: zne_nn.NNState


class AmortisedState(NamedTuple):
    curves: zne_study.Curves
    training: zne_study.Training
    model: zne_nn.Amortised
    key: jax.Array


def study_spec(c: Any) -> zne_study.StudySpec:
    """The part of the config that decides the data."""
    return zne_study.StudySpec(
        c.problems, c.L, c.shots, c.curve_problem, c.curve_shots, c.lams, c.scales, c.lam1_over_lam2,
        c.noise, c.noise_convention, FixedErrors(c.readout, c.coherent), c.num_random, c.num_vqe,
        c.theta_mode, c.vqe.restarts, c.vqe.steps, c.vqe.learning_rate,
    )  # fmt: skip


@functools.lru_cache(maxsize=32)
def _curves(spec: zne_study.StudySpec, seed: tuple[int, ...], x64: bool) -> zne_study.Curves:
    del x64  # part of the cache's key
    return zne_study.make_curves(jax.random.wrap_key_data(jnp.array(seed, jnp.uint32)), spec)


def curves_of(key: jax.Array, spec: zne_study.StudySpec) -> zne_study.Curves:
    seed = tuple(int(k) for k in jax.random.key_data(key))
    return _curves(spec, seed, jax.config.jax_enable_x64)


def build(config: Any) -> Experiment:
    spec = study_spec(config)
    lams = jnp.asarray(spec.lams)
    grid = jnp.linspace(0.0, lams[-1], 41)
    count = config.points or config.fit_points or len(spec.lams)
    example = (
        len(spec.shots)
        - 1
        + len(spec.shots)
        * max((i for i, p in enumerate(spec.problems) if p == spec.curve_problem), default=0)
    )

    def flat(energies):  # f[T, C, m] -> f[T C, count], the points this arm uses
        return energies[..., :count].reshape(-1, count)

    def results(curves, values, ok=None):
        failed = 0 if ok is None else (~ok).sum()
        sites = {"fallbacks": jnp.asarray(failed), "sites_total": jnp.asarray(curves.ideal.size)}
        return zne_study.score(values.reshape(curves.ideal.shape), curves, spec) | sites

    if config.estimator == "nn":
        hp = zne_nn.Hyper(**config.nn.to_dict())

        def init(key):
            curves = curves_of(key, spec)
            return NetState(curves, zne_nn.fit_init(key, curves.ideal.size, hp))

        def step(state):
            nets, mse = zne_nn.fit_step(state.nets, lams[:count], flat(state.curves.energies), hp)
            return state._replace(nets=nets), {"loss": mse}

        def evaluate(state):
            y = flat(state.curves.energies)
            out = zne_nn.nn_predict(state.nets.params, lams[:count], y, grid, hp)
            row = example * state.curves.ideal.shape[1] + state.curves.ideal.shape[1] - 1
            extra = {
                "lam": grid,
                "fitted": out[row].mean(0),
                "net_spread": jnp.median(out[..., 0].std(1)),
            }
            return results(state.curves, out[..., 0].mean(1)) | extra

        return Experiment(init, evaluate, (Phase("fit the nets", hp.steps, step),))

    if config.estimator == "nn_amortised":
        am = config.amortised
        hp2 = zne_nn.AmortisedHyper(am.hidden, learning_rate=am.learning_rate, batch=am.batch)

        def init_all(key):
            data = zne_study.make_training(key, spec, am.num_circuits, am.depths)
            model = zne_nn.amortised_init(jax.random.fold_in(key, 3), data.features, hp2)
            return AmortisedState(curves_of(key, spec), data, model, jax.random.fold_in(key, 4))

        def step_all(state):
            model, loss = zne_nn.amortised_step(state.model, state.key, *state.training, hp2)
            return state._replace(model=model), {"loss": loss}

        def evaluate_all(state):
            rows = [
                zne_nn.amortised_predict(
                    state.model,
                    zne_study.amortised_features(e, spec, p.n, p.depth, s),
                    e[:, 0],
                    hp2,
                )
                for e, (p, s) in zip(state.curves.energies, zne_study.tasks(spec), strict=True)
            ]
            return results(state.curves, jnp.stack(rows))

        return Experiment(init_all, evaluate_all, (Phase("train the net", am.steps, step_all),))

    folding = config.estimator == "folding"
    name = "richardson" if folding else config.estimator
    name = "exp_survival" if name == "exp_fixed" and config.exp_in == "survival" else name
    fit = zne.estimator(name)
    x = lams[0] * jnp.asarray(spec.scales) if folding else lams[:count]

    def evaluate_fit(curves):
        y = curves.folded.reshape(-1, x.size) if folding else flat(curves.energies)
        out = jax.vmap(lambda e: fit(x, e, jnp.zeros((), e.dtype), grid))(y)
        row = example * curves.ideal.shape[1] + curves.ideal.shape[1] - 1
        return results(curves, out.value[:, 0], out.ok) | {"lam": grid, "fitted": out.value[row]}

    return Experiment(functools.partial(curves_of, spec=spec), evaluate_fit)
