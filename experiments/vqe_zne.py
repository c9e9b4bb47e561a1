"""Zero-noise extrapolation by networks and by classical fits, on the same noisy energies.

Arms are estimators. Curves come from the seed's key alone, so all arms get the same circuits, points and shots;
within one process they are computed once and shared. Errors are in units of sum_j |c_j| of the Hamiltonian.
"""

from __future__ import annotations

import functools
from typing import Any

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
    "win_share": Metric("%", "higher", "circuits with an error below the raw point's"),
    "p90_ratio": Metric("", "lower", "90th percentile of |error| / |error of the raw point|"),
    "net_spread": Metric(_UNIT, "none", "median standard deviation over the ensemble"),
    "fallbacks": Metric("", "lower", "curves an exponential or a GP could not fit: linear instead"),
    "sites_total": Metric("", "none", "curves"),
}
_CLASSICAL = (
    *("linear", "quadratic", "cubic", "richardson3", "richardson5", "richardson10"),
    *("exp_fixed", "exp_free", "poly_loo", "folding", "gp"),
)
_ABSTRACT, _NN = "abstract, checked form", "nn"
_WIN = "win_share >= 90 %, written as p90_ratio <= 1"
CLAIMS = (
    Claim("The net beats the raw point in 90 % of VQE circuits, exact values", _ABSTRACT,
          (_NN, "vqe_inf/p90_ratio"), "<=", 1.0, note=_WIN),
    Claim("The same for H = Z^3 alone, VQE and random circuits", _ABSTRACT,
          (_NN, "zn_n3_inf/p90_ratio"), "<=", 1.0, note=_WIN),
    Claim("The same at 10^4 shots", _ABSTRACT, (_NN, "vqe_1e4/p90_ratio"), "<=", 1.0, note=_WIN),
    Claim("The same at 10^4 shots, random circuits", _ABSTRACT, (_NN, "random_1e4/p90_ratio"), "<=", 1.0),
    Claim("The net is at least as good as the best classical fit, exact values", "ours",
          (_NN, "vqe_inf/median_error"), "<=", (_CLASSICAL, "vqe_inf/median_error"),
          note="expected to fail: E(lam) is a polynomial"),
    Claim("The net is at least as good as the best classical fit, 10^4 shots", "ours",
          (_NN, "vqe_1e4/median_error"), "<=", (_CLASSICAL, "vqe_1e4/median_error")),
    Claim("A net over many circuits beats the best classical fit, 10^4 shots", "ours",
          ("nn_amortised", "vqe_1e4/median_error"), "<=", (_CLASSICAL, "vqe_1e4/median_error"),
          note="it alone gets noise-free labels, of random circuits"),
    Claim("The same on random circuits, the kind it was trained on", "ours",
          ("nn_amortised", "random_1e4/median_error"), "<=", (_CLASSICAL, "random_1e4/median_error")),
    Claim("Richardson on all points has less bias than the net", "ours",
          ("richardson10", "vqe_inf/bias"), "<=", (_NN, "vqe_inf/bias")),
    Claim("Richardson on all points has more spread than the net at 10^4 shots", "ours",
          ("richardson10", "vqe_1e4/spread"), ">=", (_NN, "vqe_1e4/spread")),
)  # fmt: skip
FIGURES = (
    Figure("Error at exact values and 10^4 shots", "bars", "median_error", logy=True,
           tasks=("vqe_inf", "vqe_1e4", "random_inf", "random_1e4")),
    Figure("Error against shots", "line", "error_by_shots", "shots", "shots a point",
           "median |error|", logx=True, logy=True),
    Figure("Fitted E(lam) of one VQE circuit, sampled (raw: the points)", "line", "fitted", "lam", "lam",
           "E / sum|c|", arms=("raw", "linear", "cubic", "richardson3", "exp_fixed", "gp", "nn", "nn_relu")),
    Figure("Training of the nets", "curve", "loss", logy=True),
)  # fmt: skip


def study_spec(c: Any) -> zne_study.StudySpec:
    """The part of the config that decides the data."""
    return zne_study.StudySpec(
        c.problems, c.L, c.shots, c.curve_problem, c.curve_shots, c.lams, c.scales, c.amplify,
        c.lam1_over_lam2, c.noise, c.noise_convention, FixedErrors(c.readout, c.coherent), c.num_random,
        c.num_vqe, c.theta_mode, c.vqe.restarts, c.vqe.steps, c.vqe.learning_rate,
    )  # fmt: skip


def build(config: Any) -> Experiment:
    spec = study_spec(config)
    coordinates = jnp.asarray(zne_study.coordinates(spec))
    grid = jnp.linspace(0.0, coordinates[-1], 41)
    count = min(config.points or config.fit_points or coordinates.size, coordinates.size)
    lams = coordinates[:count]

    def flat(curves):
        return curves.energies[..., :count].reshape(-1, count)

    def results(curves, values, ok=None):  # values f[T C, 41]: the fits on the grid, from 0
        out = zne_study.score(values[:, 0].reshape(curves.ideal.shape), curves, spec)
        out |= {"fallbacks": 0 if ok is None else (~ok).sum(), "sites_total": values.shape[0]}
        drawn = values[len(spec.shots) * curves.ideal.shape[1] - 1]  # first problem, last circuit
        return out | ({"lam": grid, "fitted": drawn} if drawn.size > 1 else {})

    if config.estimator == "nn":
        hp = zne_nn.Hyper(**config.nn.to_dict())

        def init(key):
            curves = zne_study.curves_of(key, spec)
            return curves, zne_nn.fit_init(key, curves.ideal.size, hp)

        def step(state):
            curves, nets = state
            nets, mse = zne_nn.fit_step(nets, lams, flat(curves), hp)
            return (curves, nets), {"loss": mse}

        def evaluate(state):
            curves, nets = state
            out = zne_nn.nn_predict(nets.params, lams, flat(curves), grid, hp)
            return results(curves, out.mean(1)) | {"net_spread": jnp.median(out[..., 0].std(1))}

        return Experiment(init, evaluate, (Phase("fit the nets", hp.steps, step),), "map", False)

    if config.estimator == "nn_amortised":
        am = config.amortised
        hp2 = zne_nn.AmortisedHyper(am.hidden, "relu", am.learning_rate, am.batch, am.steps)
        lab = spec._replace(noise=am.noise, fixed=FixedErrors()) if am.noise else spec

        def init_net(key):
            data = zne_study.make_training(key, lab, am.num_circuits, am.depths)
            model = zne_nn.amortised_init(jax.random.fold_in(key, 3), data.features, hp2)
            return zne_study.curves_of(key, spec), data, model, jax.random.fold_in(key, 4)

        def step_net(state):
            curves, data, model, key = state
            batch = data.features, data.raw, data.target
            model, loss = zne_nn.amortised_step(model, key, *batch, hp2)
            return (curves, data, model, key), {"loss": loss}

        def evaluate_net(state):
            curves, _, model, _ = state
            x, raw = zne_study.curve_features(curves, spec), curves.energies[..., 0].reshape(-1)
            return results(curves, zne_nn.amortised_predict(model, x, raw, hp2)[:, None])

        return Experiment(
            init_net, evaluate_net, (Phase("train", am.steps, step_net),), "map", False
        )

    folding = config.estimator == "folding"
    name = "richardson" if folding else config.estimator
    name = "exp_survival" if (name, config.exp_in) == ("exp_fixed", "survival") else name
    x = coordinates[0] * jnp.asarray(spec.scales) if folding else lams

    def evaluate_fit(curves):
        y = curves.folded.reshape(-1, x.size) if folding else flat(curves)
        return results(curves, *zne.fit_curves(name, x, y, jnp.zeros((), y.dtype), grid))

    init_fit = functools.partial(zne_study.curves_of, spec=spec)
    return Experiment(init_fit, evaluate_fit, jittable=False)
