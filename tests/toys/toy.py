"""Toy (Nobody 2026): least squares by SGD with two learning rates.

The smallest study that has all a study can have; the runner's tests use it.
"""

from qlab.lab.config import base, grid

VARIANTS = ("", "smoke")
CONVENTIONS = {"half": (True,), "steps": (20,)}


def get_config(variant=""):
    c = base(
        "./toy_experiment.py",
        seeds=4,
        steps=200,
        lr=0.1,
        half=False,
        widths=(4, 4),
        loop="scan",
        layout="vmap",
        bad_seed=-1,  # this seed's loss becomes NaN ...
        bad_step=50,  # ... at this step; bad_seed = -2 means all seeds
        host_steps=0,
        pause_s=0.0,  # a sleep in every host step
        init_pause_s=0.0,
        fail=False,
        note=None,
        optimizer=dict(name="sgd", momentum=0.0),
    )
    c.arms = dict(small=dict(lr=0.01), big=dict(lr=0.1, optimizer=dict(momentum=0.5)))
    if variant == "smoke":
        c.update(steps=40, seeds=2)
    return c


def sweep():
    yield from grid({"steps": (10, 20), "half": (False, True)})
