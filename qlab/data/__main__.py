"""List the data sets, describe some, or fetch them now for later work offline."""

import argparse
import sys

from qlab import data
from qlab.data.files import find, read
from qlab.data.registry import DATASETS
from qlab.lab.errors import UserError


def _state(name: str) -> str:
    used = data.files(name)
    if used is None:
        return "embedded"
    key, needed = used
    here = sum(find(DATASETS[key], f) is not None for f in needed)
    size = sum(f.size for f in needed) / 1e6
    return f"{here} of {len(needed)} files here, {size:.1f} MB"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qlab.data", description=__doc__)
    parser.add_argument("names", nargs="*", help="data sets; none: list all")
    parser.add_argument("--get", action="store_true", help="fetch what is absent and check it")
    args = parser.parse_args(argv)
    try:
        if not args.names:
            for name in data.names():
                print(f"{name:18} {_state(name)}")
        for name in args.names:
            used = data.files(name)
            if args.get and used:
                for f in used[1]:
                    read(DATASETS[used[0]], f.path)
            print(data.describe(name))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
