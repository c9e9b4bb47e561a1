"""python -m qlab.run: one study. All arms over all seeds, the claim table, the page."""

from __future__ import annotations

import argparse
import shlex
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlab.lab import config as configs
from qlab.lab import study
from qlab.lab.errors import Preempted, UserError

_EPILOG = """\
examples:
  python -m qlab.run --list
  python -m qlab.run --config configs/flexround.py              the standard comparison
  python -m qlab.run --config flexround:smoke                   by name, the half-minute variant
  python -m qlab.run --config flexround --arms rtn_mse,flexround --seeds 5 --config.bits=3
  python -m qlab.run --config my_config.py --workdir runs/mine  your own config file
  python -m qlab.run --config ptq_table:full --trial            memory and time to expect, before hours are spent

The same command resumes a stopped run, skips finished arms, and rewrites the page.
Exit codes: 0 done, 2 bad input, 3 all seeds of an arm non-finite, 75 stopped and saved.
"""


def run(
    config: str,
    *,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    workdir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "auto",
    deterministic: bool = False,
    fresh: bool = False,
    time_limit_s: float = 0.0,
    quiet: bool = False,
    command: str = "",
) -> study.Result:
    """Runs one study, as `python -m qlab.run` does.

    Args:
      config: path or name of a config, with ":variant" if wanted: "q_star:smoke".
      arms: names of the arms to run (default: all). seeds: how many (default: the config's).
      workdir: run folder (default: runs/<paper>-<variant>-<hash>); an unfinished run resumes there.
      overrides: {"optimizer.lr": 1e-3}, dotted config keys.
      device: auto, cpu, gpu or tpu. deterministic: bitwise on a GPU too, slower.
      fresh: set an earlier run in that folder aside and start again.
      time_limit_s: stop and save before this many seconds are over; 0 means no limit.
      quiet: print nothing.
    Returns:
      A Result with the rows of results.jsonl, the claims with verdicts, and the page's path.
    Raises:
      UserError: bad input; the message is one line with the remedy.
      Preempted: stopped by a signal or the time limit, after saving.
    """
    p = study.plan(config, overrides=overrides, arms=arms, seeds=seeds, workdir=workdir)
    return study.run_study(
        p,
        device=device,
        deterministic=deterministic,
        fresh=fresh,
        time_limit_s=time_limit_s,
        command=command or _command(p, config, arms, seeds, workdir, overrides),
        quiet=quiet,
    )


def _command(
    p: study.Plan,
    config: str,
    arms: Sequence[str] | None,
    seeds: int | None,
    workdir: str | Path | None,
    overrides: Mapping[str, Any] | None,
) -> str:
    words = ["python", "-m", "qlab.run", "--config", config]
    words += ["--arms", ",".join(arms)] if arms else []
    words += ["--seeds", str(seeds)] if seeds is not None else []
    words += [f"--config.{k}={v}" for k, v in (overrides or {}).items()]
    words += ["--workdir", str(workdir)] if workdir else []
    return shlex.join(words)


def list_papers() -> str:
    """One line a paper: name and title."""
    files = configs.config_files()
    width = max(map(len, files), default=0)
    return "\n".join(f"{name:{width}}  {configs.title(path)}" for name, path in files.items())


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Takes `--config.key=value` and `--config.key value` out of a command line."""
    rest, overrides, it = [], {}, iter(argv)
    for word in it:
        if word.startswith("--config."):
            key, equals, value = word.removeprefix("--config.").partition("=")
            if not equals:
                value = next(it, None)
                if value is None:
                    raise UserError(f"--config.{key} needs a value: --config.{key}=...")
            overrides[key] = value
        else:
            rest.append(word)
    return rest, overrides


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        prog="python -m qlab.run",
        description="Runs one paper's comparison: every arm over several seeds, then checks its claims.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out.add_argument(
        "--config", metavar="FILE|NAME[:VARIANT]", help="the study: a path, or a name from --list"
    )
    out.add_argument(
        "--config.KEY=VALUE", dest="_", help="override one key of the config; dots go inside"
    )
    out.add_argument("--list", action="store_true", help="list all papers, one line each")
    out.add_argument("--arms", help="run only these, comma separated")
    out.add_argument("--seeds", type=int, help="number of seeds")
    out.add_argument("--workdir", help="run folder (default runs/<paper>-<variant>-<hash>)")
    out.add_argument("--device", default="auto", help="auto, cpu, gpu or tpu")
    out.add_argument(
        "--deterministic", action="store_true", help="bitwise repeatable on a GPU too, slower"
    )
    out.add_argument("--fresh", action="store_true", help="set an earlier run in that folder aside")
    out.add_argument(
        "--time-limit", type=float, default=0.0, metavar="S", help="save and stop before S seconds"
    )
    out.add_argument(
        "--trial",
        action="store_true",
        help="only try the widest step of each arm at full shapes: memory and time to expect; writes nothing",
    )
    out.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        rest, overrides = split_overrides(words)
        args = parser().parse_args(rest)
        if args.list:
            print(list_papers())
            return 0
        if not args.config:
            raise UserError(
                "which study? give --config NAME (python -m qlab.run --list names them)"
            )
        arms = [a.strip() for a in args.arms.split(",") if a.strip()] if args.arms else None
        if args.trial:
            p = study.plan(args.config, overrides=overrides, arms=arms, seeds=args.seeds)
            study.try_study(p, device=args.device)
            return 0
        run(
            args.config,
            arms=arms,
            seeds=args.seeds,
            workdir=args.workdir,
            overrides=overrides,
            device=args.device,
            deterministic=args.deterministic,
            fresh=args.fresh,
            time_limit_s=args.time_limit,
            quiet=args.quiet,
            command=shlex.join(["python", "-m", "qlab.run", *words]),
        )
    except (UserError, Preempted) as e:
        return study.exit_code(e)
    return 0


class _Callable(types.ModuleType):
    """Lets `qlab.run(...)` be the function although `qlab.run` is this module."""

    def __call__(self, *args: Any, **kwargs: Any) -> study.Result:
        return run(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    sys.exit(main())
