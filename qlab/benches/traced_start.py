"""python -m qlab.benches.traced_start OUT -- arguments of qlab.run: runs to the end of the first chunk.

Writes {name of a moment: seconds since the epoch} to OUT and leaves the process there. The moments are
taken around functions of qlab.lab; the run itself is the one that `python -m qlab.run` does.
"""

import time

MOMENTS = {"python": time.time()}  # before anything else: what came before is the interpreter


def _mark(name):
    MOMENTS.setdefault(name, time.time())


def _around(module, name, before="", after=""):
    """Puts a wrapper in the place of module.name that marks the moments before and after the call."""
    inner = getattr(module, name)

    def wrapped(*args, **kwargs):
        if before:
            _mark(before)
        out = inner(*args, **kwargs)
        if after:
            _mark(after)
        return out

    setattr(module, name, wrapped)


def main(out, argv):
    import json
    import os

    from qlab import run

    _mark("qlab")
    from qlab.lab import device, registry

    _around(device, "session", before="jax")
    experiment = registry.experiment

    def found(*args):
        _mark("device")
        module = experiment(*args)
        _mark("experiment")
        from qlab.lab import arm, loop

        _around(arm, "_start", before="build", after="init")
        _around(loop, "compile_phase", after="compile")
        run_phase = loop.run_phase

        def first_chunk(*args):
            for _ in run_phase(*args):
                _mark("first_step")
                with open(out, "w") as f:
                    json.dump(MOMENTS, f)
                os._exit(0)
            yield

        loop.run_phase = first_chunk
        return module

    registry.experiment = found
    return run.main(argv)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1], sys.argv[3:]))
