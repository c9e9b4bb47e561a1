"""One test body for every implementation of an operation: interpreted on a CPU, compiled where the device is."""

import jax
import pytest

# Half of the interpreted cases a day: they are most of the time of all tests.
INTERPRETED = [pytest.param(n, marks=pytest.mark.rotates(2)) for n in ("pallas_gpu", "pallas_tpu")]
NATIVE = {"cpu": (), "gpu": ("pallas_gpu",), "tpu": ("pallas_tpu",)}


@pytest.fixture(params=["reference", "xla", *INTERPRETED])
def run(request):
    """run(op, impls, *args, **options): the operation by one implementation.

    A test is skipped, with the reason, where this implementation refuses its case; which cases an
    implementation must take is asserted by each operation's own test of its refusals.
    """
    name = request.param
    native = name in NATIVE.get(jax.default_backend(), ())
    interpreted = name.startswith("pallas") and not native

    def call(op, impls, *args, **options):
        if name not in {i.name for i in impls}:
            pytest.skip(f"no {name} of this operation")
        try:
            return op(*args, **options, impl=name, interpret=interpreted)
        except NotImplementedError as e:
            pytest.skip(str(e))

    call.impl = name
    # The interpreter's programs are large and run once: most of their time would be XLA optimizing them.
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or interpreted)
    yield call
    jax.config.update("jax_disable_most_optimizations", before)
