"""The 15-puzzle searched by another library, for the search bench: deepxube (PyTorch, NumPy, Python objects)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from qlab.benches.kernel_peers import Absent


def _need(name: str) -> Any:
    try:
        return importlib.import_module(f"deepxube.{name}")
    except ImportError as e:
        gone = (e.name or "deepxube").partition(".")[0]
        raise Absent(f"{gone} is not installed (pip install {gone})") from None


def deepxube(
    mode: str, far: np.ndarray, batch: int
) -> Callable[[np.ndarray, int], tuple[int, int, int]]:
    """Its own batched A* or Q* on its own 15-puzzle, the heuristic in NumPy for all states of a batch.

    Args:
      mode: "astar" or "qstar". far: [cell, tile] -> moves that the tile is away, 0 for the blank.
    Returns:
      (start u8[16], node_limit) -> nodes generated, states stored, cost (-1: node limit). It stops as
      "bound" does, when nothing in OPEN can be cheaper than its best goal.
    Raises:
      Absent: deepxube, or a package that it imports, is not installed.
    """
    puzzle, search = _need("domains.npuzzle"), _need("pathfinding.graph_search")
    base, domain, cells = _need("base.pathfinding"), puzzle.NPuzzle(4), np.arange(16)

    def distance(states):
        tiles = np.stack([s.tiles for s in states])
        return tiles, far[cells, tiles].sum(1)

    def h(states, goals):
        return distance(states)[1].tolist()

    def q(states, goals, actions):  # one tile moves into the blank's cell
        tiles, parent = distance(states)
        blank = tiles.argmin(1)[:, None]
        to = domain.swap_zero_idxs[blank[:, 0]]
        tile = np.take_along_axis(tiles, to, 1)
        return (1 + parent[:, None] + far[blank, tile] - far[to, tile]).tolist()

    kind, heuristic = {
        "astar": (search.GraphSearchHeurNodeActsEnum, base.FNsHeurV(h)),
        "qstar": (search.GraphSearchHeurEdgeActsEnum, base.FNsHeurQ(q)),
    }[mode]

    def run(start: np.ndarray, node_limit: int) -> tuple[int, int, int]:
        finder = kind(domain, heuristic, batch_size=batch)
        root, goal = puzzle.NPState(np.asarray(start)), puzzle.NPGoal(domain.goal_tiles)
        finder.add_instances(finder.make_instances([root], [goal]))
        (found,) = finder.instances
        while not found.finished() and found.num_nodes_generated < node_limit:
            finder.step()
        cost = int(found.path_cost()) if found.finished() else -1
        return found.num_nodes_generated, len(found.closed_dict), cost

    return run
