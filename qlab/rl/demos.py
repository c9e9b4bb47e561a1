"""Demonstrations that the user brings: an .npz file, or an offline set of Minari that lies on this machine.

A file holds arrays in the order of time, episode after episode (the last may be unfinished):
    obs f[N, S], action f[N, D] in [-1, 1], reward f[N], terminated bool[N], truncated bool[N],
    next_obs f[N, S] (the observation before any reset)
A Minari set is named "minari:<id>"; its actions are scaled from the bounds of its action space to [-1, 1].
Letters: N = steps, S = observation size, D = action dimensions.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlab.lab.errors import UserError
from qlab.rl.agent import Transition
from qlab.rl.rollout import best_share, episode_returns

FIELDS = ("obs", "action", "reward", "terminated", "truncated", "next_obs")
Arrays = dict[str, np.ndarray]


def save_demos(path: str | Path, arrays: Arrays) -> None:
    """Writes the six arrays as `load_demos` reads them."""
    if missing := [f for f in FIELDS if f not in arrays]:
        raise UserError(f"{path}: no array {missing[0]!r}; demonstrations are {', '.join(FIELDS)}")
    np.savez_compressed(path, allow_pickle=False, **{f: np.asarray(arrays[f]) for f in FIELDS})


def _read_npz(source: str) -> Arrays:
    path = Path(source)
    if not path.is_file():
        raise UserError(
            f"demos={source}: no such file; give an .npz, or minari:<id> for a Minari set"
        )
    try:
        with np.load(path, allow_pickle=False) as z:
            if missing := [f for f in FIELDS if f not in z.files]:
                raise UserError(
                    f"demos={source}: no array {missing[0]!r}; a file of demonstrations holds {', '.join(FIELDS)}"
                )
            return {f: z[f] for f in FIELDS}
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as e:
        raise UserError(f"demos={source}: not an .npz file of arrays ({type(e).__name__})") from e


def _read_minari(name: str) -> Arrays:
    try:
        import minari  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"demos=minari:{name} needs minari: pip install 'qlab[minari]'") from e
    try:
        dataset = minari.load_dataset(name)
    except ImportError as e:  # what reads its files is an extra of Minari's own
        why = str(e).splitlines()[0]
        raise UserError(f"demos=minari:{name}: {why}; pip install 'qlab[minari]'") from e
    except Exception as e:  # its own errors differ between versions
        raise UserError(
            f"demos=minari:{name}: not on this machine ({type(e).__name__}); get it with: minari download {name}"
        ) from e
    space = dataset.action_space
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    if low is None or high is None or not np.isfinite([low, high]).all():
        raise UserError(f"demos=minari:{name}: actions {space} are no box with finite bounds")
    parts: dict[str, list[np.ndarray]] = {f: [] for f in FIELDS}
    for episode in dataset.iterate_episodes():
        seen, action = episode.observations, episode.actions
        if not isinstance(seen, np.ndarray) or seen.ndim != 2:
            raise UserError(f"demos=minari:{name}: observations are no vectors")
        row = (
            seen[:-1],
            2 * (np.asarray(action, np.float64) - low) / (high - low) - 1,
            episode.rewards,
            episode.terminations,
            # a recording that stops is cut there like one that ran out of time
            np.append(episode.truncations[:-1], not episode.terminations[-1]),
            seen[1:],
        )
        for f, x in zip(FIELDS, row, strict=True):
            parts[f].append(np.asarray(x))
    if not parts["obs"]:
        raise UserError(f"demos=minari:{name}: no episodes")
    return {f: np.concatenate(p) for f, p in parts.items()}


def _check(source: str, arrays: Arrays, obs_dim: int, action_dim: int) -> None:
    n = len(arrays["reward"]) if arrays["reward"].ndim else 0
    want = {"obs": (n, obs_dim), "action": (n, action_dim), "next_obs": (n, obs_dim)}
    if not n:
        raise UserError(f"demos={source}: no steps")
    for f, x in arrays.items():
        shape = want.get(f, (n,))
        if x.shape != shape:
            raise UserError(
                f"demos={source}: {f} {x.shape}, expected {shape} (observations of {obs_dim}, actions of {action_dim} "
                "numbers, as the task has)"
            )
        if x.dtype.kind not in "fiub" or not np.isfinite(x).all():
            raise UserError(f"demos={source}: {f} holds something that is no finite number")
    if (worst := np.abs(arrays["action"]).max()) > 1 + 1e-5:
        raise UserError(
            f"demos={source}: an action of size {worst:.3g}; scale the actions to [-1, 1]"
        )


def load_demos(
    source: str,
    obs_dim: int,
    action_dim: int,
    *,
    discount: float,
    demo_share: float = 1.0,
    reward_scale: float = 1.0,
) -> tuple[Transition, np.ndarray]:
    """Demonstrations as a Transition of NumPy arrays f32 with leading axis N, and the best episode's return f32[].

    Args:
      source: path of an .npz file, or "minari:<id>".
      discount: gamma, for `Transition.discount` and the returns. demo_share: share of the steps with `demo` = 1, those
        of the episodes with the best returns. reward_scale: the rewards are multiplied by it.
    Raises:
      UserError: anything that does not fit, in one line.
    """
    is_set = source.startswith("minari:")
    arrays = _read_minari(source.removeprefix("minari:")) if is_set else _read_npz(source)
    _check(source, arrays, obs_dim, action_dim)
    x: dict[str, Any] = {f: np.asarray(a, np.float32) for f, a in arrays.items()}
    reward = reward_scale * x["reward"]
    over = (x["terminated"] + x["truncated"]) > 0
    total = episode_returns(jnp.asarray(reward), jnp.asarray(over), discount)
    data = Transition(
        obs=x["obs"],
        action=np.clip(x["action"], -1, 1),
        reward=reward,
        discount=np.float32(discount) * (1 - x["terminated"]),
        next_obs=x["next_obs"],
        demo=best_share(total, demo_share),
    )
    best = episode_returns(jnp.asarray(reward), jnp.asarray(over), 1.0).max()
    return jax.tree.map(np.asarray, (data, best))
