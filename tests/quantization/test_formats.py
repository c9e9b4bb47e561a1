"""Checkpoint formats: the lab's own file, and other projects' against bits picked one by one in Python."""

import importlib
import json
import os
import subprocess
import sys
import types
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab import ops
from qlab.lab.errors import UserError
from qlab.quantization import QTensor, dequantize, pack_qtensor, quantize_matrix, unpack_qtensor

safetensors = pytest.importorskip("safetensors.numpy", reason="needs pip install 'qlab[formats]'")
from qlab.quantization import formats  # noqa: E402
from qlab.quantization.formats import files  # noqa: E402


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def record(bits=4, granularity="group:32", symmetric=False, shape=(32, 64), seed=0):
    qt = quantize_matrix(
        draw(shape, seed), method="rtn", bits=bits, granularity=granularity, symmetric=symmetric,
        calibration="minmax",
    )  # fmt: skip
    return pack_qtensor(qt)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def rounded(qt, dtype=np.float16):
    """The record with its scales as an f16 file holds them."""
    scale = jnp.asarray(np.asarray(qt.scale).astype(dtype), jnp.float32)
    return QTensor(
        qt.codes, scale, qt.zero, None, qt.bits, qt.axes, qt.shape, True, qt.packed_group
    )


# The lab's own file


def test_saved_records_come_back_bit_for_bit(tmp_path):
    real = unpack_qtensor(record())
    real = QTensor(real.codes, real.scale, None, real.scale * 0.3, 4, (1,), real.shape)
    qts = {
        "a": record(3, "channel", True),
        "b": record(4, "group:32"),
        "c": unpack_qtensor(record(8, "tensor")),
        "d": pack_qtensor(real),
        "e": record(2, "group:4", shape=(3, 10)),
        "f": jax.tree.map(lambda a: jnp.stack([a, a]), record(4)),
    }
    path = tmp_path / "net.safetensors"
    formats.save_qtensors(path, qts, {"made_by": "test", "n": 3})
    got = formats.load_qtensors(path)
    assert sorted(got) == sorted(qts)
    for name in qts:
        same(got[name], qts[name])
    assert formats.load_metadata(path) == {"made_by": "test", "n": 3}
    assert safetensors.load_file(path)["b.zero"].dtype == np.uint8
    assert not list(tmp_path.glob("*.part"))


def test_a_record_goes_through_orbax_with_and_without_its_layout(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    qt = record(3)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "tree", {"layer": qt})
        saver.wait_until_finished()
        blank = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), {"layer": qt})
        same(saver.restore(tmp_path / "tree", blank)["layer"], qt)
    arrays, static = formats.as_arrays(qt)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as saver:
        saver.save(
            tmp_path / "parts",
            ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), static=ocp.args.JsonSave(static)
            ),
        )
        got = saver.restore(
            tmp_path / "parts",
            ocp.args.Composite(arrays=ocp.args.StandardRestore(), static=ocp.args.JsonRestore()),
        )
    same(formats.from_arrays(got["arrays"], got["static"]), qt)


READER = """
import sys, numpy as np
from qlab import ops
from qlab.kernels.weight_only_matmul import api
from qlab.quantization import formats
qts, x = formats.load_qtensors(sys.argv[1]), np.load(sys.argv[2])
out = {}
for i in api.IMPLS:
    for name, qt in qts.items():
        try:
            out[f"{i.name} {name}"] = np.asarray(
                ops.matmul(x, qt, impl=i.name, interpret=i.name == "pallas_tpu"))
        except NotImplementedError as e:
            print(i.name, name, e)
np.savez(sys.argv[3], **out)
"""


def test_a_record_saved_here_runs_in_another_process_with_every_implementation(tmp_path):
    qts = {
        "sym": record(4, "channel", True, (16, 128)),
        "zero": record(3, "group:32", shape=(16, 128)),
    }
    x = np.asarray(draw((8, 128), 1))
    formats.save_qtensors(tmp_path / "w.safetensors", qts)
    np.save(tmp_path / "x.npy", x)
    args = [str(tmp_path / n) for n in ("w.safetensors", "x.npy", "y.npz")]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", READER, *args], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = np.load(args[2])
    assert {"reference sym", "reference zero", "xla sym", "xla zero"} <= set(got)
    for key in got:
        w = np.asarray(dequantize(qts[key.split()[1]]), np.float64)
        size = np.abs(x) @ np.abs(w).T
        assert (np.abs(got[key] - x.astype(np.float64) @ w.T) <= 2e-6 * size).all(), key


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "flip":
        data[-3] ^= 1
        path.write_bytes(data)
    elif kind == "text":
        path.write_text("hello")
    elif kind == "foreign":
        safetensors.save_file({"a": np.ones(3)}, path)
    elif kind == "version":
        head = {"format": "qlab-qtensors", "version": "9", "qtensors": "{}", "metadata": "{}"}
        safetensors.save_file({"a": np.ones(3)}, path, head)
    elif kind == "gone":
        path.unlink()
    elif kind in ("lies", "json"):
        tensors, head = safetensors.load_file(path), files.metadata(path)
        head["qtensors"] = head["qtensors"].replace('"bits": 4', '"bits": 3')
        head["qtensors"] = "{" if kind == "json" else head["qtensors"]
        safetensors.save_file(tensors, path, head)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "not a whole safetensors file"),
        ("flip", "not those that were written"),
        ("text", "not a whole safetensors file"),
        ("foreign", "not written by save_qtensors.*read_gptq"),
        ("version", "version '9'.*update qlab"),
        ("gone", "does not exist"),
        ("lies", "w: a row of codes has 32 bytes, expected 24"),
        ("json", "header is damaged"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, kind, message):
    path = tmp_path / "w.safetensors"
    formats.save_qtensors(path, {"w": record(4)})
    damage(path, kind)
    with pytest.raises(UserError, match=message) as e:
        formats.load_qtensors(path)
    assert "\n" not in str(e.value)
    assert str(path) in str(e.value)


def test_int4_is_never_written(tmp_path):
    qt = unpack_qtensor(record(4, symmetric=True))
    bad = QTensor(qt.codes.astype(jnp.int4), qt.scale, None, None, 4, (1,), qt.shape)
    with pytest.raises(UserError, match=r"w: codes are int4.*astype"):
        formats.save_qtensors(tmp_path / "w.safetensors", {"w": bad})
    assert not list(tmp_path.iterdir())


# Words of other projects


def bit_by_bit(words, bits, i):
    """Code i of a little-endian stream of 32-bit words."""
    value = 0
    for b in range(bits):
        at = i * bits + b
        value |= ((int(words[at // 32]) >> (at % 32)) & 1) << b
    return value


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_are_a_little_endian_bit_stream(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (2, 45)).astype(np.uint8)
    words = files.to_words(codes, bits)
    assert words.dtype == np.int32
    assert words.shape == (2, -(-45 * bits // 32))
    for row in range(2):
        assert [bit_by_bit(words[row], bits, i) for i in range(45)] == codes[row].tolist()
    np.testing.assert_array_equal(files.from_words(words, bits, 45), codes)


CASES = [
    (2, "group:32", False), (3, "group:32", True), (4, "group:32", False), (4, "channel", True),
    (8, "channel", False), (4, "tensor", False),
]  # fmt: skip


def expect(qt):
    """What a file holds of a record: a scale for every row; a zero point of 2^(b-1) everywhere is none."""
    shape = (qt.shape[0], qt.scale.shape[-1])
    scale, zero = (None if a is None else jnp.broadcast_to(a, shape) for a in (qt.scale, qt.zero))
    if zero is not None and (zero == 2 ** (qt.bits - 1)).all():
        zero = None
    return QTensor(qt.codes, scale, zero, None, qt.bits, (1,), qt.shape, True, qt.packed_group)


@pytest.mark.parametrize(("bits", "granularity", "symmetric"), [*CASES, (5, "channel", False)])
def test_compressed_tensors_round_trip(tmp_path, bits, granularity, symmetric):
    qts = {"a.q": record(bits, granularity, symmetric), "a.k": record(4, "channel", True)}
    rest = {"a.bias": np.ones(3, np.float32), "plain.weight_scale": np.ones(1, np.float32)}
    formats.write_compressed_tensors(tmp_path, qts, rest=rest, model_config={"hidden_size": 64})
    got = formats.read_compressed_tensors(tmp_path)
    assert not got.perms
    assert sorted(got.rest) == sorted(rest)
    for name in qts:
        same(got.qtensors[name], expect(qts[name]))
        np.testing.assert_array_equal(got.weight(name), dequantize(qts[name]))
    one = formats.read_compressed_tensors(tmp_path, match=r"\.q$")
    assert list(one.qtensors) == ["a.q"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hidden_size"] == 64
    held = safetensors.load_file(tmp_path / "model.safetensors")
    codes = np.asarray(unpack_qtensor(qts["a.q"]).codes, int) + (
        2 ** (bits - 1) if symmetric else 0
    )
    words = held["a.q.weight_packed"]
    assert [bit_by_bit(words[5], bits, i) for i in range(64)] == codes[5].tolist()
    if not symmetric:
        zeros = held["a.q.weight_zero_point"]
        want = np.broadcast_to(qts["a.q"].zero, (32, zeros.shape[1]))[:, 0]
        assert [bit_by_bit(zeros[:, 0], bits, i) for i in range(32)] == want.tolist()


def test_compressed_tensors_of_older_releases_and_with_activation_order(tmp_path):
    """3 bits, ten codes to a word; a scale of the whole tensor with an i8 zero point; g_idx."""
    qt = expect(record(3, "group:32", shape=(8, 320)))
    codes = np.asarray(unpack_qtensor(qt).codes, np.uint32)
    fields = codes.reshape(8, 32, 10) << (3 * np.arange(10, dtype=np.uint32))
    perm = np.random.default_rng(0).permutation(320)
    order = np.argsort(perm)
    shuffled = np.ascontiguousarray(codes[:, order]).reshape(8, 32, 10) << (
        3 * np.arange(10, dtype=np.uint32)
    )
    zeros = files.to_words(np.ascontiguousarray(np.asarray(qt.zero).T).astype(np.uint8), 3)
    one = record(4, "tensor")
    one = QTensor(one.codes, one.scale, jnp.full((1, 1), 5.0), None, 4, (1,), one.shape, True)
    tensors = {
        "old.weight_packed": fields.sum(-1, dtype=np.uint32).view(np.int32),
        "act.weight_packed": shuffled.sum(-1, dtype=np.uint32).view(np.int32),
        "act.weight_g_idx": (np.arange(320) // 32)[order].astype(np.int32),
        "one.weight_packed": files.to_words(np.asarray(unpack_qtensor(one).codes), 4),
        "one.weight_scale": np.asarray(one.scale)[0],
        "one.weight_zero_point": np.asarray(one.zero)[0].astype(int).astype(np.int16).astype("i1")
        - 8,
        "one.weight_shape": np.array(one.shape),
    }
    for name in ("old", "act"):
        tensors[f"{name}.weight_scale"] = np.asarray(qt.scale)
        tensors[f"{name}.weight_zero_point"] = np.ascontiguousarray(zeros.T)
        tensors[f"{name}.weight_shape"] = np.array(qt.shape)
    safetensors.save_file(tensors, tmp_path / "w.safetensors")

    def group(bits, **more):
        return {"num_bits": bits, "symmetric": False, **more}

    config = {
        "config_groups": {
            "x": {"targets": ["re:old|act"], "weights": group(3, group_size=32)},
            "y": {"targets": ["one"], "weights": group(4)},
        }
    }
    got = formats.read_compressed_tensors(tmp_path / "w.safetensors", config=config)
    same(got.qtensors["old"], qt)
    np.testing.assert_array_equal(got.weight("one"), dequantize(one))
    assert list(got.perms) == ["act"]
    np.testing.assert_array_equal(got.weight("act"), np.asarray(dequantize(qt))[:, order])
    x = draw((3, 320), 1)
    y = ops.matmul(x, got.qtensors["act"], perm=jnp.asarray(got.perms["act"]))
    np.testing.assert_allclose(y, x @ got.weight("act").T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize(("bits", "granularity", "symmetric"), CASES)
def test_gptq_round_trip(tmp_path, bits, granularity, symmetric, version):
    qt = record(bits, granularity, symmetric)
    if version == "gptq" and not symmetric:
        zero = jnp.maximum(qt.zero, 1)
        qt = QTensor(qt.codes, qt.scale, zero, None, bits, qt.axes, qt.shape, True, qt.packed_group)
    formats.write_gptq(tmp_path, {"a": qt}, version=version)
    got = formats.read_gptq(tmp_path)
    assert not got.perms
    same(got.qtensors["a"], rounded(expect(qt)))
    held = safetensors.load_file(tmp_path / "model.safetensors")
    codes = np.asarray(unpack_qtensor(qt).codes, int) + (2 ** (bits - 1) if symmetric else 0)
    assert [bit_by_bit(held["a.qweight"][:, 7], bits, i) for i in range(64)] == codes[7].tolist()
    zero = (
        2 ** (bits - 1)
        if symmetric
        else int(jnp.broadcast_to(qt.zero, (32, qt.scale.shape[-1]))[7, 0])
    )
    assert bit_by_bit(held["a.qzeros"][0], bits, 7) == zero - (version == "gptq")


def test_gptq_zero_point_0_of_version_1_borrows_within_its_word(tmp_path):
    """As GPTQModel writes it: one subtraction of 0x1111_1111 from the word."""
    qt = record(4, "channel")
    zero = jnp.asarray(np.arange(32) % 4, jnp.float32)[:, None]
    qt = QTensor(qt.codes, qt.scale, zero, None, 4, qt.axes, qt.shape, True)
    with pytest.raises(UserError, match=r"zero points of 0.*gptq_v2"):
        formats.write_gptq(tmp_path, {"a": qt})
    formats.write_gptq(tmp_path, {"a": qt}, version="gptq_v2")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    tensors["a.qzeros"] = (tensors["a.qzeros"].view(np.uint32) - np.uint32(0x11111111)).view(
        np.int32
    )
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    got = formats.read_gptq(tmp_path, config={"bits": 4, "group_size": -1})
    np.testing.assert_array_equal(got.qtensors["a"].zero, zero)


def test_gptq_activation_order_comes_as_a_permutation(tmp_path):
    qt = record(4, "group:32", shape=(16, 96))
    perm = np.random.default_rng(3).permutation(96).astype(np.int32)
    formats.write_gptq(tmp_path, {"a": qt}, perms={"a": perm}, version="gptq_v2")
    got = formats.read_gptq(tmp_path)
    held = safetensors.load_file(tmp_path / "model.safetensors")
    codes = np.asarray(unpack_qtensor(qt).codes, float)
    scale, zero = (np.asarray(a, float) for a in (rounded(qt).scale, qt.zero))
    want = np.empty((16, 96))
    for column, place in enumerate(perm):
        g = held["a.g_idx"][place]
        assert g == column // 32
        want[:, place] = scale[:, g] * (codes[:, column] - zero[:, g])
    np.testing.assert_allclose(got.weight("a"), want, rtol=1e-6)
    x = draw((3, 96), 4)
    y = ops.matmul(x, got.qtensors["a"], perm=jnp.asarray(got.perms["a"]))
    np.testing.assert_allclose(y, np.asarray(x, float) @ want.T, rtol=1e-4, atol=1e-4)
    held["a.g_idx"][:] = np.sort(held["a.g_idx"])
    held["a.g_idx"][31] = 1  # 31, 33 and 32 columns
    safetensors.save_file(held, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="g_idx puts 31 to 33 columns into a group, expected 32"):
        formats.read_gptq(tmp_path)


def test_awq_round_trip(tmp_path):
    qt = record(4, "group:32")
    formats.write_awq(tmp_path, {"a": qt, "b": record(4, "group:32", True)})
    got = formats.read_awq(tmp_path)
    same(got.qtensors["a"], rounded(expect(qt)))
    assert got.qtensors["b"].zero is None
    held = safetensors.load_file(tmp_path / "model.safetensors")
    codes = np.asarray(unpack_qtensor(qt).codes)
    word = int(held["a.qweight"][9, 2])
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    assert [(word >> 4 * i) & 15 for i in range(8)] == [codes[16 + o, 9] for o in order]
    word = int(held["a.qzeros"][1, 3])
    assert [(word >> 4 * i) & 15 for i in range(8)] == [int(qt.zero[24 + o, 1]) for o in order]


def test_a_folder_of_shards_is_read_as_one(tmp_path):
    formats.write_awq(tmp_path, {"a": record(4), "b": record(4, seed=1)}, rest={"n": np.ones(2)})
    whole = formats.read_awq(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    where = {n: f"part{n.startswith('b')}.safetensors" for n in tensors}
    for shard in set(where.values()):
        part = {n: a for n, a in tensors.items() if where[n] == shard}
        safetensors.save_file(part, tmp_path / shard)
    (tmp_path / files.INDEX).write_text(json.dumps({"weight_map": where}))
    got = formats.read_awq(tmp_path)
    for name in "ab":
        same(got.qtensors[name], whole.qtensors[name])
    (tmp_path / "partTrue.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard partTrue\.safetensors is missing"):
        formats.read_awq(tmp_path)


def edit(name, change):
    """An edit of model.safetensors: tensor `name` replaced by change(tensor), or removed."""

    def apply(folder):
        tensors = safetensors.load_file(folder / "model.safetensors")
        new = change(tensors.pop(name))
        if new is not None:
            tensors[name] = np.ascontiguousarray(new)
        safetensors.save_file(tensors, folder / "model.safetensors")

    return apply


def config(**change):
    def apply(folder):
        whole = json.loads((folder / "config.json").read_text())
        whole["quantization_config"].update(change)
        (folder / "config.json").write_text(json.dumps(whole))

    return apply


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "gptq",
            edit("a.scales", lambda a: a[:1]),
            r"a\.scales has shape \(1, 32\), expected \(2, 32\)",
        ),
        ("gptq", edit("a.qzeros", lambda a: None), r"'a\.qzeros' is missing"),
        (
            "gptq",
            edit("a.qweight", lambda a: a.astype(np.int64)),
            "a.qweight is int64, expected int32",
        ),
        ("gptq", edit("a.qweight", lambda a: None), r"no tensor ends in '\.qweight'"),
        ("gptq", config(checkpoint_format="marlin"), "format='marlin'; read_gptq reads gptq and"),
        ("gptq", config(bits=5), "bits=5; read_gptq reads"),
        ("gptq", config(bits="4"), "bits='4', expected an integer"),
        ("gptq", config(bits=None), "config has no bits.*pass config="),
        ("awq", config(version="gemv"), "version='gemv'.*\"gemm\""),
        ("awq", edit("a.scales", lambda a: a[:, :8]), r"a\.scales has shape \(2, 8\)"),
        ("ct", config(format="float-quantized"), "format='float-quantized'"),
        ("ct", config(config_groups={}), "belongs to none of 0 config_groups"),
        (
            "ct",
            edit("a.weight_packed", lambda a: a[:, :3]),
            "3 words a row, expected 8 for 64 codes of 4",
        ),
        ("ct", edit("a.weight_scale", lambda a: a[:, :1]), None),
        ("ct", edit("a.weight_scale", lambda a: np.tile(a, (1, 2))), "groups of 32 in 64 columns"),
        ("ct", lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
    ],
)
def test_bad_checkpoints_are_one_line(tmp_path, kind, change, message):
    write, read = {
        "gptq": (formats.write_gptq, formats.read_gptq),
        "awq": (formats.write_awq, formats.read_awq),
        "ct": (formats.write_compressed_tensors, formats.read_compressed_tensors),
    }[kind]
    write(tmp_path, {"a": record(4, "group:32", True)})
    change(tmp_path)
    if message is None:
        return
    with pytest.raises(UserError, match=message) as e:
        read(tmp_path)
    assert "\n" not in str(e.value)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize(
    ("write", "qts", "message"),
    [
        ("gptq", {"a": record(5, "channel")}, "stores 2, 3, 4 or 8 bits, given 5"),
        ("gptq", {"a": record(4), "b": record(8)}, "one width and one group"),
        ("gptq", {"a": record(4, "channel", shape=(6, 16))}, r"shape \(6, 16\).*multiples of 8"),
        ("awq", {"a": record(3)}, "stores 4 bits, given 3"),
        ("awq", {"a": record(4, "channel", shape=(6, 16))}, "multiples of 8 outputs"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, write, qts, message):
    with pytest.raises(UserError, match=message):
        getattr(formats, f"write_{write}")(tmp_path, qts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", ["compressed_tensors", "gptq", "awq"])
def test_real_offsets_odd_zero_points_and_tiny_scales_are_refused(tmp_path, write):
    qt, call = record(4), getattr(formats, f"write_{write}")
    make = lambda scale, zero, offset: QTensor(  # noqa: E731
        qt.codes, scale, zero, offset, 4, (1,), qt.shape, True, 32
    )
    with pytest.raises(UserError, match="a has a real offset"):
        call(tmp_path, {"a": make(qt.scale, None, qt.scale)})
    with pytest.raises(UserError, match=r"zero points outside 0 \.\. 15"):
        call(tmp_path, {"a": make(qt.scale, qt.zero + 20, None)})
    if write != "compressed_tensors":
        with pytest.raises(UserError, match=r"scales from .* stores f16"):
            call(tmp_path, {"a": make(qt.scale * 1e-7, jnp.maximum(qt.zero, 1), None)})


# The reference libraries' own code


def own_module(name, bare=()):
    """A module of an installed library without running the __init__ of the packages in `bare`, which may
    need a GPU; the test is skipped with the reason if it is not there."""
    root = name.split(".")[0]
    if name in sys.modules:
        return sys.modules[name]
    if find_spec("torch") is None or find_spec(root) is None:
        pytest.skip(f"needs torch and {root}: pip install 'qlab[formats-peers]'")
    places = list(find_spec(root).submodule_search_locations)
    for package in bare:
        module = types.ModuleType(package)
        module.__path__ = [os.path.join(p, *package.split(".")[1:]) for p in places]
        sys.modules[package] = module
    try:
        return importlib.import_module(name)
    except ImportError as e:
        for package in bare:
            del sys.modules[package]
        pytest.skip(f"{name} cannot be imported: {e}")


@pytest.mark.parametrize(("bits", "granularity", "symmetric"), [*CASES, (5, "channel", False)])
def test_compressed_tensors_library_agrees(tmp_path, bits, granularity, symmetric):
    own_module("compressed_tensors")
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from safetensors.torch import load_file, save_file

    qt = record(bits, granularity, symmetric)
    formats.write_compressed_tensors(tmp_path, {"a": qt})
    weights = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    args = QuantizationArgs(**weights["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["a"], weights=args)
    codec = BaseCompressor.get_value_from_registry("pack-quantized")
    held = load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix("a."): t for name, t in held.items()}
    weight = codec.decompress(state, scheme)["weight"]
    np.testing.assert_array_equal(weight.numpy(), dequantize(qt))
    # and what the library writes is read back to the same record
    state = {"weight": weight, "weight_scale": state["weight_scale"]}
    if not symmetric:
        zero = np.broadcast_to(qt.zero, (32, qt.scale.shape[-1])) - 2 ** (bits - 1)
        state["weight_zero_point"] = torch.tensor(zero).to(torch.int8)
    theirs = {f"a.{name}": t.contiguous() for name, t in codec.compress(state, scheme).items()}
    save_file(theirs, tmp_path / "model.safetensors")
    same(formats.read_compressed_tensors(tmp_path).qtensors["a"], expect(qt))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptqmodel_agrees(tmp_path, bits, version):
    theirs = own_module("gptqmodel.utils.model_dequant", ("gptqmodel", "gptqmodel.quantization"))
    import torch

    qt = record(bits, "group:32")
    zero = jnp.maximum(qt.zero, version == "gptq")
    qt = QTensor(qt.codes, qt.scale, zero, None, bits, qt.axes, qt.shape, True, 32)
    perm = np.random.default_rng(3).permutation(64).astype(np.int32)
    formats.write_gptq(tmp_path, {"a": qt}, perms={"a": perm}, version=version)
    got = formats.read_gptq(tmp_path)
    file = tmp_path / "model.safetensors"
    weight = theirs.convert_gptq_file(file, torch.float32, got.config, "cpu")["a.weight"]
    np.testing.assert_array_equal(weight.numpy(), got.weight("a"))


def test_autoawq_agrees(tmp_path):
    theirs = own_module("awq.utils.packing_utils", ("awq", "awq.utils"))
    from safetensors.torch import load_file

    formats.write_awq(tmp_path, {"a": record(4)})
    held = load_file(tmp_path / "model.safetensors")
    weight = theirs.dequantize_gemm(
        *(held[f"a.{n}"] for n in ("qweight", "qzeros", "scales")), 4, 32
    )
    want = formats.read_awq(tmp_path).weight("a")
    # their product is rounded to f16
    np.testing.assert_allclose(weight.numpy().T, want, rtol=2**-11)
