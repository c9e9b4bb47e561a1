"""The contract between a paper and the runner.

`experiments/<paper>.py` has `build(config) -> Experiment` for one arm (config is the merged config of
that arm, `config.arm` its name), and beside it
    CLAIMS   tuple[Claim, ...]       the paper's own claims, as inequalities over (arm, metric)
    METRICS  dict[str, Metric]       unit and direction of each result metric (by its last name part)
    FIGURES  tuple[Figure, ...]      what to draw

One Experiment is one arm and one seed; the runner owns seeds, loops, clocks, files and signals.
Letters: S = seeds, T = steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    import jax

State = TypeVar("State")
Metrics = Mapping[str, Any]


class Phase(NamedTuple, Generic[State]):
    """A stretch of equal steps: train a net, reconstruct one layer, search a set of instances.

    Attributes:
      name: shown while it compiles and runs.
      num_steps: how often `step` runs.
      step: state -> (state, metrics); pure, metrics are scalars, the same names each time. Randomness
        comes from keys in the state folded with a step counter in the state, never from outside.
      loop: "scan" (jitted chunks), "step" (a Python loop over one jitted step: convolutions on CPU),
        "host" (not jitted, called once per seed: wall clocks, simulators, endpoints).
      widest: moves a state to the most expensive step, at full shapes; for `--trial`. None: steps are alike.
    """

    name: str
    num_steps: int
    step: Callable[[State], tuple[State, Metrics]]
    loop: Literal["scan", "step", "host"] = "scan"
    widest: Callable[[State], State] | None = None


class Experiment(NamedTuple, Generic[State]):
    """One arm, one seed.

    Attributes:
      init: key -> state. Called once per seed on the host, not jitted: it may train or load a
        cached net and read data sets (jit its heavy parts yourself). Deterministic in the key.
        The state is a pytree of arrays with a structure that no phase changes.
      evaluate: state -> metrics. Scalars become results, arrays become figures. A name may start
        with a task: "w3_tensor/accuracy". Reserved: "fallbacks" and "sites_total" (see claims).
      phases: run in order; no phases means nothing to train.
      seed_layout: "vmap" runs the seeds in one program, "map" one after another (use it where a
        step has lax.cond or while loops, which vmap would run on both sides, or convolutions).
      jittable: False if `evaluate` must run on the host, once per seed.
    """

    init: Callable[[jax.Array], State]
    evaluate: Callable[[State], Metrics]
    phases: tuple[Phase[State], ...] = ()
    seed_layout: Literal["vmap", "map"] = "vmap"
    jittable: bool = True

    @property
    def num_steps(self) -> int:
        return sum(p.num_steps for p in self.phases)


def side_by_side(parts: Mapping[str, Experiment[Any]]) -> Experiment[Any]:
    """Several Experiments as one: their phases in order, each on its own state {part: state}.

    All begin with the same key, so what they draw from it is paired. The names of their results must differ. One part
    alone is returned as it is.

    Raises:
      ValueError: no parts, or one result name from two of them.
    """
    if not parts:
        raise ValueError("side_by_side needs at least one experiment")
    if len(parts) == 1:
        return next(iter(parts.values()))

    def own(name: str, p: Phase[Any]) -> Phase[Any]:
        def step(states: dict[str, Any]):
            new, metrics = p.step(states[name])
            return {**states, name: new}, metrics

        widest = p.widest
        move = None if widest is None else lambda s: {**s, name: widest(s[name])}
        return p._replace(name=f"{name} {p.name}", step=step, widest=move)

    def evaluate(states: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, part in parts.items():
            found = part.evaluate(states[name])
            if twice := sorted(out.keys() & found.keys()):
                raise ValueError(f"two parts give a result called {twice[0]!r}; name them apart")
            out |= found
        return out

    layouts = {part.seed_layout for part in parts.values()}
    return Experiment(
        lambda key: {name: part.init(key) for name, part in parts.items()},
        evaluate,
        tuple(own(name, p) for name, part in parts.items() for p in part.phases),
        "vmap" if layouts == {"vmap"} else "map",
        all(part.jittable for part in parts.values()),
    )


class SupportsExperiment(Protocol):
    """What the runner accepts besides `Experiment`: an object with these four attributes."""

    num_steps: int

    def init(self, key: jax.Array) -> Any: ...
    def step(self, state: Any) -> tuple[Any, Metrics]: ...
    def evaluate(self, state: Any) -> Metrics: ...


def as_experiment(obj: Experiment | SupportsExperiment) -> Experiment:
    """The record form of any object with num_steps, init, step and evaluate.

    Raises:
      TypeError: an attribute is missing; the message names it.
    """
    if isinstance(obj, Experiment):
        return obj
    for name in ("num_steps", "init", "step", "evaluate"):
        if not hasattr(obj, name):
            raise TypeError(
                f"build() returned {type(obj).__name__} without `{name}`; see qlab.lab.experiment"
            )
    loop: Any = getattr(obj, "loop", "scan")
    phases = (Phase("train", int(obj.num_steps), obj.step, loop),) if obj.num_steps else ()
    return Experiment(
        init=obj.init,
        evaluate=obj.evaluate,
        phases=phases,
        seed_layout=getattr(obj, "seed_layout", "vmap"),
        jittable=getattr(obj, "jittable", True),
    )


class Metric(NamedTuple):
    """What a result number means: its unit, which way is better, and one line of text.

    Metrics with unit "s" are wall-clock times: they are left out of bitwise comparisons.
    """

    unit: str = ""
    better: Literal["higher", "lower", "none"] = "none"
    text: str = ""


class Claim(NamedTuple):
    """left - right >= margin (or <=, or the ratio left / right), checked over paired seeds.

    Attributes:
      text: the claim in words. source: where the paper says it ("abstract", "Table 2").
      left: (arm, metric), metric = "task/metric" or "metric".
      op: ">=" or "<=".
      right: (arm, metric), a number, or ((arm, arm, ...), metric): the best of these arms by mean
        (the strongest opponent: the highest for ">=", the lowest for "<=").
      margin: of the difference, or of the ratio when kind = "ratio" (interval taken on logs).
      exact: True where no spread over seeds is expected (a theorem, an exact count); otherwise a
        comparison in which neither side varies with the seed is INCONCLUSIVE.
      paper: the paper's own number for `left - right` (or the ratio), if it prints one.
      note: one line on what the claim can and cannot show at this scale.
    """

    text: str
    source: str
    left: tuple[str, str]
    op: Literal[">=", "<="]
    right: tuple[str, str] | tuple[tuple[str, ...], str] | float
    margin: float = 0.0
    kind: Literal["difference", "ratio"] = "difference"
    exact: bool = False
    paper: float | None = None
    note: str = ""


class Figure(NamedTuple):
    """One plot of the report page.

    kind "curve": the step metric `y` from metrics.jsonl over steps, mean and band over seeds, a line an arm.
    kind "bars":  the result metric `y` over tasks, a bar an arm, 95 % interval whiskers.
    kind "line":  the named array `y` against the named array `x` from evaluate, a line an arm; with `diagonal`
                  also the line y = x (on linear axes).
    kind "heatmap": the named 2-D array `y`, one panel an arm (mean over seeds).
    kind "circuit": the named array `y` f[G, 6] of the first seed, see qlab.lab.circuit_plot.
    kind "profile": the result metric `y` over all its tasks together: the share of runs above a value, with bootstrap
                  bands, interquartile means and probabilities of improvement (qlab.lab.aggregates).
    kind "filmstrip": the named array `y` f[F, L, 5] of the first seed, a strip an arm, `x` the steps of its frames,
                  see qlab.lab.filmstrip.
    `arms` restricts to some arms, `tasks` to some tasks (empty: all).
    """

    title: str
    kind: Literal["curve", "bars", "line", "heatmap", "circuit", "profile", "filmstrip"]
    y: str
    x: str = ""
    xlabel: str = ""
    ylabel: str = ""
    logx: bool = False
    logy: bool = False
    arms: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    diagonal: bool = False
