"""Neural zero-noise extrapolation for VQE (Bhattacharjee et al. 2024, arXiv 2403.07025): a small net per curve against classical extrapolation.

Every arm is an estimator of E(0), the noise-free energy of a fixed circuit, from the same m = 10 energies at
noise lam = 0.01 .. 0.10. The paper's abstract fixes the RY-RZ ansatz, H = Z on every qubit, depolarizing noise and a
feed-forward net; layers, net sizes and training are ours (1-32-32-1 tanh, standardised, Adam 1e-2, 3000 full-batch
steps, L2 1e-4, mean of 5 nets). Ours too: the other Hamiltonians (Z^n has ground energy -1 in any odd-parity state),
the classical estimators, the shot noise, and a net trained over many circuits (nn_amortised).

Depolarizing noise of strength lam (Qiskit's: every Pauli on the gate's qubits shrinks by 1 - lam) follows each gate,
so E(lam) is a polynomial in lam. Shots = 0 are exact expectation values; otherwise each point gets that many
measurements, split evenly over the Hamiltonian's terms, each term measured on its own. Folding measures 3 points
(scales 1, 3, 5 at the smallest lam) with as many shots a point; the amortised net needs noise-free labels of 2000
random circuits of the same sizes, which no other arm gets, and one problem (zn_n3_L3) has a depth it never saw.

Tasks: <problem>_<shots> (10 random circuits and 10 VQE-optimised ones), vqe_<shots> and random_<shots> pooled over
the problems of depth L. VQE circuits are the ones that count. A seed draws circuits, starts, shots and nets.
Expected, from E(lam) being a polynomial: the nets beat the raw point with exact values, and lose to Richardson,
cubic and Gaussian process by orders of magnitude; shots turn the order of the Richardson family round.
About 5 min on two CPU cores, 20 s with :smoke; :device is the run with hidden noise, amplified by gate folding.
    python -m qlab.run --config configs/vqe_zne.py
    python -m qlab.run --config configs/vqe_zne.py --config.noise=thermal --config.readout=0.01,0.03
"""

from ml_collections import ConfigDict

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke", "device", "full")

CONVENTIONS = {
    "lam1_over_lam2": (0.1,),  # one-qubit gates ten times better, as on devices
    "noise_convention": ("pauli_p",),  # the swept number read as the Pauli error probability
    "theta_mode": ("reopt",),  # VQE trained anew at every noise level
    "fit_points": (5,),  # only the five least noisy points
    "nn.standardise": (False,),
    "nn.activation": ("relu",),
    "nn.l2": (0.0,),
    "exp_in": ("survival",),  # exponential in -log(1 - lam) instead of lam
}


def get_config(variant: str = "") -> ConfigDict:
    c = base(
        experiment="vqe_zne",
        seeds=5,
        x64=True,  # Richardson on 10 points multiplies rounding by 430
        problems=(
            "zn_n3",
            "zn_n2",
            "zn_n4",
            "tfim_n2",
            "tfim_n3",
            "tfim_n4",
            "h2_2q_n2",
            "zn_n3_L3",
        ),
        L=2,  # entangling blocks
        shots=(0, 10_000),
        curve_problem="zn_n3",  # also measured at these, for the error against shots
        curve_shots=(100, 1000, 10_000, 100_000),
        lams=(0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10),
        lam1_over_lam2=1.0,
        noise="depol",  # depol, ampdamp, dephase, thermal, device
        noise_convention="qiskit",
        readout=(0.0, 0.0),  # P(1|0), P(0|1): does not scale with lam
        coherent=0.0,  # over-rotation of every gate, radians: does not scale with lam
        num_random=10,
        num_vqe=10,
        theta_mode="fixed",  # trained at the smallest lam, then swept
        vqe=dict(restarts=3, steps=200, learning_rate=0.1),
        scales=(1, 3, 5),  # of gate folding
        amplify="lam",  # points of a curve: "lam" levels, or "fold"ed gates at the smallest level
        estimator="nn",
        points=0,  # the arm's number of points, 0 = fit_points
        fit_points=0,  # 0 = all
        exp_in="lam",
        nn=dict(
            hidden=(32, 32),
            activation="tanh",
            learning_rate=1e-2,
            l2=1e-4,
            steps=3000,
            ensemble=5,
            standardise=True,
        ),
        amortised=dict(
            num_circuits=2000,
            depths=(1, 2),
            noise="",  # of its training circuits; "" = the study's own, with all its errors
            hidden=(64, 64),
            learning_rate=3e-3,  # and steps: chosen on further random circuits, not on the tasks
            batch=256,
            steps=12_000,
        ),
    )
    c.arms = {
        "raw": dict(estimator="raw"),
        "linear": dict(estimator="linear"),
        "quadratic": dict(estimator="quadratic"),
        "cubic": dict(estimator="cubic"),
        "richardson3": dict(estimator="richardson", points=3),
        "richardson5": dict(estimator="richardson", points=5),
        "richardson10": dict(estimator="richardson"),
        "exp_fixed": dict(estimator="exp_fixed"),
        "exp_free": dict(estimator="exp_free"),
        "poly_loo": dict(estimator="poly_loo"),
        "folding": dict(estimator="folding"),
        "gp": dict(estimator="gp"),
        "nn": dict(estimator="nn"),
        "nn_relu": dict(estimator="nn", nn=dict(activation="relu")),
        "nn_amortised": dict(estimator="nn_amortised"),
    }
    if variant == "smoke":
        c.update(seeds=1, problems=("zn_n2",), L=1, curve_problem="zn_n2", num_vqe=1, num_random=2)
        c.curve_shots = (1000, 10_000)
        c.nn.steps = 200
        c.vqe.steps = 30
        c.amortised.update(num_circuits=40, depths=(1,), steps=200)
    if variant == "device":  # hidden noise, amplified by folding: what a device would give
        c.update(noise="device", readout=(0.01, 0.03), amplify="fold", scales=(1, 3, 5, 7))
        c.amortised.noise = "depol"  # nobody tells the net what the device does
    if variant == "full":  # density matrices of 4^8 entries: for an accelerator
        c.problems = ("zn_n6", "zn_n8", "tfim_n6", "tfim_n8", "zn_n8_L6")
        c.update(seeds=10, L=4, num_random=50, num_vqe=50, curve_problem="zn_n8")
        c.amortised.update(num_circuits=100_000, depths=(2, 3, 4), steps=50_000)
    return c


def sweep():
    yield from grid(
        {
            "noise": ("depol", "ampdamp", "thermal"),
            "readout": ((0.0, 0.0), (0.01, 0.03)),
            "lams": (
                (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10),
                (0.03, 0.04, 0.05, 0.06, 0.07),
            ),
            "nn.hidden": ((16, 16), (32, 32), (64, 64)),
        }
    )
