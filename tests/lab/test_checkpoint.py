"""Checkpoints: bit for bit back, strict, and a damaged one never taken for a whole one."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab.lab import checkpoint
from qlab.lab.errors import UserError


class State(NamedTuple):
    key: jax.Array
    rbg: jax.Array
    half: jax.Array
    low: jax.Array
    tiny: jax.Array
    empty: jax.Array
    count: jax.Array
    flags: jax.Array
    nested: dict


def state(x=0.0):
    return State(
        jax.random.split(jax.random.key(3), 4),
        jax.random.key(1, impl="rbg"),
        jnp.arange(6, dtype=jnp.bfloat16) + x,
        jnp.array([-8, 7], jnp.int4),
        jnp.array([0.5, jnp.nan], jnp.float8_e4m3fn),
        jnp.zeros((0, 3)),
        jnp.int32(7),
        jnp.array([True, False]),
        {"a": jnp.float32(jnp.pi), "b": [jnp.arange(3, dtype=jnp.uint8)]},
    )


def save(folder, step, s, extra=None, config_hash="c0", keep=3):
    checkpoint.save(folder, step, s, extra or {}, config_hash, keep)


def restore(folder, s, config_hash="c0", say=print):
    return checkpoint.restore(folder, lambda extra: s, config_hash, say)


def test_round_trip_is_bitwise(tmp_path):
    s = state()
    save(tmp_path, 5, s, {"bytes": 10})
    back = restore(tmp_path, s)
    assert (back.step, back.extra) == (5, {"bytes": 10})
    assert checkpoint.digest(back.state) == checkpoint.digest(s)
    for a, b in zip(checkpoint.leaves(s)[1], checkpoint.leaves(back.state)[1], strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()
    assert jax.random.bits(back.state.key[2]) == jax.random.bits(s.key[2])
    assert isinstance(back.state, State)


def test_keeps_the_newest(tmp_path):
    for step in range(5):
        save(tmp_path, step, state(), keep=2)
    assert checkpoint.steps(tmp_path) == [3, 4]
    assert restore(tmp_path, state()).step == 4


def test_nothing_there_is_none(tmp_path):
    assert restore(tmp_path / "absent", state()) is None


def damage_arrays(place):
    files = sorted(
        (p for p in (place / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(files[-1].read_bytes())
    data[len(data) // 2] ^= 0xFF
    files[-1].write_bytes(data)


def cut_arrays(place):
    for p in (place / "state").rglob("*"):
        if p.is_file() and p.parent.name == "d":
            p.write_bytes(p.read_bytes()[:-5])


DAMAGES = {
    "a flipped byte": damage_arrays,
    "a cut file": cut_arrays,
    "no meta": lambda p: (p / "meta.json").unlink(),
    "cut meta": lambda p: (p / "meta.json").write_text((p / "meta.json").read_text()[:40]),
    "meta of another kind": lambda p: (p / "meta.json").write_text("[1]"),
    "a wrong checksum": lambda p: (p / "meta.json").write_text(
        json.dumps(
            {
                **(m := json.loads((p / "meta.json").read_text())),
                "tree": [[*t[:3], 1] for t in m["tree"]],
            }
        )
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    save(tmp_path, 1, state(1.0))
    save(tmp_path, 2, state(2.0))
    DAMAGES[damage](tmp_path / "0000000002")
    said = []
    back = restore(tmp_path, state(), say=said.append)
    assert back.step == 1
    assert checkpoint.digest(back.state) == checkpoint.digest(state(1.0))
    assert len(said) == 1
    assert "damaged" in said[0]
    assert (tmp_path / "0000000002.damaged").is_dir()


def test_all_damaged_is_none(tmp_path):
    save(tmp_path, 1, state())
    DAMAGES["no meta"](tmp_path / "0000000001")
    assert restore(tmp_path, state(), say=lambda _: None) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s._replace(count=jnp.float32(0)), [".count", "int32[]", "float32[]"]),
        (
            lambda s: s._replace(half=jnp.zeros(7, jnp.bfloat16)),
            [".half", "bfloat16[6]", "bfloat16[7]"],
        ),
        (
            lambda s: s._replace(nested={"a": s.nested["a"], "c": s.nested["b"]}),
            ["['b'][0]", "['c'][0]"],
        ),
        (lambda s: s._replace(nested={"a": s.nested["a"]}), ["only the checkpoint", "['b'][0]"]),
        (lambda s: s._replace(nested={**s.nested, "z": jnp.zeros(2)}), ["only this run", "['z']"]),
        (lambda s: s._replace(key=s.key[:2]), [".key", "key<fry>[4,2]", "key<fry>[2,2]"]),
        (
            lambda s: s._replace(key=jax.random.split(jax.random.key(0, impl="rbg"), 4)),
            [".key", "key<rbg>"],
        ),
    ],
)
def test_another_tree_is_refused_with_the_first_difference(tmp_path, change, words):
    save(tmp_path, 1, state())
    with pytest.raises(UserError) as e:
        restore(tmp_path, change(state()))
    assert all(w in str(e.value) for w in words), str(e.value)
    assert checkpoint.steps(tmp_path) == [1]  # nothing is lost


def test_another_config_is_refused(tmp_path):
    save(tmp_path, 1, state())
    with pytest.raises(UserError, match="belongs to config c0, this run is c1"):
        restore(tmp_path, state(), config_hash="c1")


def test_a_killed_save_leaves_no_checkpoint(tmp_path):
    (tmp_path / "tmp-0000000009" / "state").mkdir(parents=True)
    assert checkpoint.steps(tmp_path) == []
    save(tmp_path, 9, state())
    assert checkpoint.steps(tmp_path) == [9]


def test_digest_leaves_wall_clocks_out():
    a = {"x": np.ones(2), "wall_s": np.float32(1)}
    assert checkpoint.digest(a) == checkpoint.digest({**a, "wall_s": np.float32(2)})
    assert checkpoint.digest(a) != checkpoint.digest({**a, "x": np.zeros(2)})
