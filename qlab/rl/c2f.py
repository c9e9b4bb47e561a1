"""Coarse-to-fine discretisation of an action box [-1, 1]^D (Seo et al. 2024, arXiv 2407.07787).

Level l splits the interval chosen at level l-1 into B bins; L levels give B^L cells per dimension
of width 2 / B^L. An action is its digits in base B, most significant first. Cells are computed from
the integer made of the digits and not by repeated zooming, so that no rounding piles up over levels.
Letters: L = levels, B = bins, D = action dimensions, T = L D tokens in level-major order, t = l D + d.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_CELLS = 2**20  # float32 still tells the cell edges apart
MAX_ENUMERATED = 2**16


class ActionGrid(NamedTuple):
    """The static shape of a discretised action: D dimensions, L levels, B bins."""

    num_dims: int
    num_levels: int
    num_bins: int

    @property
    def num_tokens(self) -> int:
        return self.num_dims * self.num_levels

    @property
    def num_actions(self) -> int:
        return self.num_bins**self.num_tokens


def action_grid(num_dims: int, num_levels: int, num_bins: int) -> ActionGrid:
    """An ActionGrid, checked.

    >>> action_grid(2, 3, 5).num_tokens
    6
    """
    if min(num_dims, num_levels) < 1 or num_bins < 2:
        raise ValueError(
            f"num_dims={num_dims}, num_levels={num_levels}, num_bins={num_bins}: "
            "expected at least 1, 1 and 2"
        )
    if num_bins**num_levels > MAX_CELLS:
        raise ValueError(
            f"num_bins={num_bins} ** num_levels={num_levels} cells per dimension are finer than "
            f"float32 can tell apart (at most {MAX_CELLS}); use fewer levels"
        )
    return ActionGrid(num_dims, num_levels, num_bins)


def _place_values(num_levels: int, num_bins: int) -> jax.Array:
    """i32[L]: B^(L-1), ..., B, 1."""
    return jnp.asarray([num_bins ** (num_levels - 1 - l) for l in range(num_levels)], jnp.int32)


def encode_c2f(action: jax.Array, num_levels: int, num_bins: int) -> jax.Array:
    """action: f32[..., D] -> bins i32[..., L, D]. Out-of-range actions go to the outermost cells.

    >>> encode_c2f(jnp.array([1.0, -1.0, 0.1]), num_levels=2, num_bins=3).tolist()
    [[2, 0, 1], [2, 0, 1]]
    """
    cells = num_bins**num_levels
    cell = jnp.clip(jnp.floor((action + 1) * (cells / 2)), 0, cells - 1).astype(jnp.int32)
    place = _place_values(num_levels, num_bins)[:, None]
    return cell[..., None, :] // place % num_bins


def decode_c2f(bins: jax.Array, num_bins: int) -> jax.Array:
    """bins: i32[..., L, D] -> centres of the final cells, f32[..., D].

    >>> decode_c2f(jnp.array([[0, 1], [1, 1]]), num_bins=2).tolist()
    [-0.25, 0.75]
    """
    num_levels = bins.shape[-2]
    cell = (bins * _place_values(num_levels, num_bins)[:, None]).sum(-2)
    return (2 * cell + 1).astype(jnp.float32) / num_bins**num_levels - 1


def zoom(
    low: jax.Array, high: jax.Array, i: jax.Array, num_bins: int
) -> tuple[jax.Array, jax.Array]:
    """Bin i of [low, high] split into num_bins: its (low, high).

    >>> [float(x) for x in zoom(jnp.float32(-1), jnp.float32(1), jnp.int32(3), 4)]
    [0.5, 1.0]
    """
    width = (high - low) / num_bins
    return low + width * i, low + width * (i + 1)


def prefix_centres(bins: jax.Array, num_bins: int) -> jax.Array:
    """Centre of the interval in which each level chooses: f32[..., L, D] from bins i32[..., L, D].

    Row l depends on rows before l only: 0 at level 0, the centre of the bin of level l-1 after.

    >>> prefix_centres(jnp.array([[0], [1], [1]]), num_bins=2).tolist()
    [[0.0], [-0.5], [-0.25]]
    """
    rows = [jnp.zeros(bins.shape[:-2] + bins.shape[-1:], jnp.float32)]
    rows += [decode_c2f(bins[..., :l, :], num_bins) for l in range(1, bins.shape[-2])]
    return jnp.stack(rows, -2)


def all_bins(grid: ActionGrid) -> np.ndarray:
    """Every action of a small grid, i32[B^T, L, D]; the last dimension of the last level runs fastest."""
    if grid.num_actions > MAX_ENUMERATED:
        raise ValueError(
            f"{grid.num_actions} joint actions are too many to enumerate (at most "
            f"{MAX_ENUMERATED}); use fewer bins, levels or dimensions"
        )
    digits = np.unravel_index(np.arange(grid.num_actions), (grid.num_bins,) * grid.num_tokens)
    shape = (-1, grid.num_levels, grid.num_dims)
    return np.stack(digits, -1).reshape(shape).astype(np.int32)
