"""The door for a matrix of one's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab.errors import UserError
from qlab.quantization import dequantize, layer_report, quantize_matrix
from qlab.quantization.matrix import METHODS


def problem(shape=(8, 16)):
    w = jax.random.normal(jax.random.key(1), shape)
    return w, jax.random.normal(jax.random.key(11), (64, shape[1])).cumsum(1)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "rtn"])
def test_methods_lower_the_output_error(method):
    w, x = problem()
    qt = quantize_matrix(w, x, method=method, bits=3, num_iters=300)
    y = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    mse = ((np.asarray(x, np.float64) @ np.asarray(dequantize(qt), np.float64).T - y) ** 2).mean()
    near = quantize_matrix(w, method="rtn", bits=3)
    near_mse = (
        (np.asarray(x, np.float64) @ np.asarray(dequantize(near), np.float64).T - y) ** 2
    ).mean()
    report = layer_report(w, qt, x)
    assert report["mse"] == pytest.approx(mse, rel=1e-3)
    assert report["nearest_mse"] == pytest.approx(near_mse, rel=1e-3)
    assert report["mse_ratio"] < 0.8


def test_shapes_scales_and_columns_that_no_group_divides():
    w, x = problem((4, 10))
    assert quantize_matrix(w, method="rtn", bits=2, granularity="tensor").scale.shape == (1, 1)
    qt = quantize_matrix(w, x, method="gptq", bits=2, granularity="group:4")
    assert qt.scale.shape == (4, 3)
    assert dequantize(qt).shape == (4, 10)
    whole = quantize_matrix(
        jnp.pad(w, [(0, 0), (0, 2)]), method="rtn", bits=2, granularity="group:4"
    )
    part = quantize_matrix(w, method="rtn", bits=2, granularity="group:4")
    np.testing.assert_array_equal(dequantize(part), dequantize(whole)[:, :10])
    symmetric = quantize_matrix(np.asarray(w), method="rtn", bits=4, symmetric=True)
    assert symmetric.zero is None
    assert symmetric.codes.dtype == jnp.int8


def test_the_report_line(capsys):
    w, x = problem()
    quantize_matrix(w, x, method="gptq", bits=3, verbose=True)
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "times that of rounding to nearest" in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 9}, "bits=9; a width from 1 to 8"),
        ({"bits": 2.0}, "bits=2.0"),
        ({"method": "flexrond"}, "did you mean flexround"),
        ({"granularity": "row"}, 'use "tensor", "channel" or "group:g"'),
        ({"calibration": "best"}, "calibration='best'"),
        ({"x_calib": None}, "needs x_calib"),
        ({"x_calib": np.ones((5, 8))}, r"pass w\.T"),
        ({"x_calib": np.ones((5, 7))}, "x_calib has 7 columns"),
        ({"w": np.ones((2, 3, 4))}, r"shape \(2, 3, 4\)"),
        ({"w": np.full((8, 16), np.nan)}, "128 values that are not finite"),
        ({"w": "weights"}, "w is a str"),
    ],
)
def test_bad_input_is_one_line_with_the_remedy(change, message):
    w, x = problem()
    with pytest.raises(UserError, match=message) as e:
        quantize_matrix(**{"w": w, "x_calib": x, **change})
    assert "\n" not in str(e.value)
