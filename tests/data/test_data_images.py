"""Digits, idx files and CIFAR-10: splits, parsers on made-up files, the real ones when present."""

import hashlib
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

import qlab.data
from qlab.data import cifar
from qlab.data.files import find
from qlab.data.images import from_uint8, idx_pair, parse_idx, stratified_pick
from qlab.data.registry import DATASETS
from qlab.lab.errors import UserError


def one_line(call, *parts):
    with pytest.raises(UserError) as e:
        call()
    line = str(e.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line


def need(key, path=None):
    """Skip unless the real files are under $QLAB_DATA."""
    files = [f for f in DATASETS[key].files if path in (None, f.path)]
    if not os.environ.get("QLAB_DATA") or not all(find(DATASETS[key], f) for f in files):
        pytest.skip(f"{key} is not under QLAB_DATA")


def rows(x):
    return {r.tobytes() for r in x.reshape(len(x), -1)}


# ---- digits


def test_digits_shapes_and_range():
    d = qlab.data.load("digits")
    assert [a.shape for a in d] == [
        (1200, 8, 8, 1), (1200,), (240, 8, 8, 1), (240,), (357, 8, 8, 1), (357,)
    ]  # fmt: skip
    for x in (d.x_train, d.x_val, d.x_test):
        assert x.dtype == np.float32
        assert (x.min(), x.max()) == (0.0, 1.0)
    for y in (d.y_train, d.y_val, d.y_test):
        assert y.dtype == np.int32
    assert d.num_classes == 10
    flat = d.flat()
    assert flat.x_val.shape == (240, 64)
    np.testing.assert_array_equal(flat.x_val[7, 8:16], d.x_val[7, 1, :, 0])


def test_digits_is_every_example_once_with_its_label():
    from sklearn.datasets import load_digits

    d = qlab.data.load("digits")
    raw = load_digits()
    # All 1,797 images are distinct, so sets of rows show that nothing is lost or used twice.
    parts = [rows(d.x_train), rows(d.x_val), rows(d.x_test)]
    assert [len(p) for p in parts] == [1200, 240, 357]
    assert len(set().union(*parts)) == 1797
    label = {(im / 16).astype(np.float32).tobytes(): t for im, t in zip(raw.images, raw.target)}  # noqa: B905
    for x, y in ((d.x_train, d.y_train), (d.x_val, d.y_val), (d.x_test, d.y_test)):
        assert [label[im.tobytes()] for im in x] == y.tolist()


def test_digits_classes_keep_their_shares():
    d = qlab.data.load("digits")
    total = sum(np.bincount(y) for y in (d.y_train, d.y_val, d.y_test))
    for y in (d.y_train, d.y_val, d.y_test):
        # Two roundings (test, then validation), each off by less than one example.
        assert np.abs(np.bincount(y) - total * len(y) / 1797).max() < 2


def test_digits_split_never_changes():
    d = qlab.data.load("digits")
    digest = hashlib.sha256(b"".join(a.astype("<f4").tobytes() for a in d)).hexdigest()
    assert digest == "199cb3d6fca026062e13e89cc51d97035970798bc5851d81ad6ab563ea084bdb"


@pytest.mark.parametrize("num", [0, 1, 5, 17, 40])
def test_stratified_pick(num):
    labels = np.array([0] * 20 + [1] * 15 + [5] * 5)
    got = stratified_pick(labels, num, seed=3)
    assert got.sum() == num
    for c, n in ((0, 20), (1, 15), (5, 5)):
        assert abs(got[labels == c].sum() - num * n / 40) < 1
    np.testing.assert_array_equal(got, stratified_pick(labels, num, seed=3))


def test_stratified_pick_depends_on_the_seed():
    labels = np.zeros(50, int)
    assert (stratified_pick(labels, 25, 0) != stratified_pick(labels, 25, 1)).any()


# ---- idx


def idx(a, magic=None):
    magic = 0x0800 + a.ndim if magic is None else magic
    return struct.pack(">i", magic) + struct.pack(f">{a.ndim}i", *a.shape) + a.tobytes()


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (7, 28, 28), np.uint8), np.arange(7, dtype=np.uint8)


def test_idx_round_trip(pair):
    x, y = idx_pair((idx(pair[0]), "x"), (idx(pair[1]), "y"))
    np.testing.assert_array_equal(x, pair[0][..., None])
    np.testing.assert_array_equal(y, pair[1])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda b: b[:-1], "truncated"),
        (lambda b: b[:10], "truncated"),
        (lambda b: b"", "truncated"),
        (lambda b: b + b"\0", "trailing bytes"),
        (lambda b: b"\0\0\x08\x01" + b[4:], "magic number 0x00000801, expected 0x00000803"),
        (lambda b: b"\0\0\x0d\x03" + b[4:], "magic number"),
        (lambda b: b[:4] + b"\xff\xff\xff\xff" + b[8:], "truncated"),
        (lambda b: b[:8] + struct.pack(">ii", 14, 56) + b[16:], "14x56, expected 28x28"),
    ],
    ids=["cut", "header", "empty", "trailing", "labels", "floats", "huge", "sides"],
)
def test_bad_idx_images(pair, damage, says):
    bad = damage(idx(pair[0]))
    one_line(lambda: idx_pair((bad, "the/images"), (idx(pair[1]), "y")), "the/images", says)


def test_bad_idx_labels(pair):
    x = (idx(pair[0]), "x")
    ten = np.array([0, 1, 2, 10, 4, 5, 6], np.uint8)
    one_line(lambda: idx_pair(x, (idx(ten), "y")), "y: label 10 at example 3, expected 0..9")
    one_line(lambda: idx_pair(x, (idx(pair[1][:6]), "y")), "7 images", "6 labels")
    one_line(lambda: idx_pair(x, (idx(pair[1]) + b"1", "y")), "trailing")
    one_line(lambda: idx_pair(x, x), "magic")


def test_parse_idx_of_no_examples():
    assert parse_idx(idx(np.zeros((0, 28, 28), np.uint8)), "x", 3).shape == (0, 28, 28)


def test_from_uint8_takes_the_last_of_train():
    x = np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1)
    y = np.arange(256, dtype=np.uint8)
    d = from_uint8(x, y, x[:3], y[:3], num_val=56)
    assert d.y_val.tolist() == list(range(200, 256))
    assert d.y_train.tolist() == list(range(200))
    # Correctly rounded k/255: the float64 quotient rounded once to float32.
    exact = (np.arange(256) / 255).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([d.x_train, d.x_val]).ravel(), exact)
    assert d.x_test.dtype == np.float32
    assert d.y_test.dtype == np.int32


def test_real_mnist():
    need("mnist")
    d = qlab.data.load("mnist")
    assert [len(a) for a in d] == [55000, 55000, 5000, 5000, 10000, 10000]
    assert d.x_test.shape[1:] == (28, 28, 1)
    # The published counts of each digit.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (np.bincount(d.y_train) + np.bincount(d.y_val)).tolist() == counts
    assert d.y_train[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert d.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    # The usual normalisation constants of the 60,000 training images.
    x = np.concatenate([d.x_train, d.x_val])
    assert abs(x.mean(dtype=np.float64) - 0.1307) < 5e-5
    assert abs(x.std(dtype=np.float64) - 0.3081) < 5e-5


def test_real_fashion_mnist():
    need("fashion_mnist")
    d = qlab.data.load("fashion_mnist")
    assert (np.bincount(d.y_train) + np.bincount(d.y_val)).tolist() == [6000] * 10
    assert d.y_train[:5].tolist() == [9, 0, 0, 3, 0]


# ---- CIFAR-10


def batch(seed, n=20):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 10, n).astype(np.uint8)


def binary(x, y):
    """Record by record, pixel by pixel: label, then red, green, blue rows."""
    out = bytearray()
    for im, label in zip(x, y, strict=True):
        out.append(label)
        for c in range(3):
            for r in range(32):
                out += bytes(im[r, :, c].tolist())
    return bytes(out)


def python2_pickle(x, y):
    """What Python 2 with NumPy 1 wrote: byte strings, protocol 2, numpy.core.multiarray."""

    def text(b):
        return b"U" + bytes([len(b)]) + b  # SHORT_BINSTRING

    def int4(i):
        return b"J" + struct.pack("<i", i)

    data = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R"
    dtype += b"(K\3" + text(b"|") + b"NNN" + int4(-1) + int4(-1) + b"K\0tb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    )
    array += b"(K\1" + int4(len(x)) + int4(3072) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(data)) + data + b"tb"
    labels = b"](" + b"".join(b"K" + bytes([v]) for v in y) + b"e"
    return b"\x80\2}(" + text(b"data") + array + text(b"labels") + labels + b"u."


def archive(kind, write, n=20):
    end = ".bin" if kind == "bin" else ""
    members = {f"data_batch_{i}{end}": write(*batch(i, n)) for i in range(1, 6)}
    members[f"test_batch{end}"] = write(*batch(6, n))
    members["readme.html"] = b"hello"
    return tar({f"cifar-10-batches-{kind}/{k}": v for k, v in members.items()})


def tar(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as t:
        for name, data in reversed(members.items()):  # order inside must not matter
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.mark.parametrize(("kind", "write"), [("bin", binary), ("py", python2_pickle)])
def test_cifar_archive_round_trip(kind, write):
    x_train, y_train, x_test, y_test = cifar.parse_archive(archive(kind, write), "c.tar.gz")
    np.testing.assert_array_equal(x_train, np.concatenate([batch(i)[0] for i in range(1, 6)]))
    np.testing.assert_array_equal(y_train, np.concatenate([batch(i)[1] for i in range(1, 6)]))
    np.testing.assert_array_equal(x_test, batch(6)[0])
    np.testing.assert_array_equal(y_test, batch(6)[1])


def test_bad_cifar_binary_batch():
    good = binary(*batch(0))
    for bad in (good[:-1], good + b"\0", b""):
        one_line(lambda bad=bad: cifar.parse_binary_batch(bad, "b.bin"), "b.bin", "3073")
    bad = bytearray(good)
    bad[3073 * 4] = 10
    one_line(lambda: cifar.parse_binary_batch(bytes(bad), "b.bin"), "label 10 at example 4")


def test_bad_cifar_python_batch():
    x, y = batch(0)
    parse = cifar.parse_python_batch
    one_line(lambda: parse(python2_pickle(x, y)[:-50], "b"), "b: not a good pickle")
    one_line(lambda: parse(b"", "b"), "not a good pickle")
    one_line(lambda: parse(python2_pickle(x, y[:-1]), "b"), "19 labels")
    one_line(lambda: parse(python2_pickle(x, np.append(y[1:], 10)), "b"), "label 10 at example 19")
    one_line(lambda: parse(pickle.dumps([1], 2), "b"), "no dict")


def test_a_pickle_cannot_run_anything(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    for protocol in (0, 2, 4):
        data = pickle.dumps({"data": Evil()}, protocol)
        one_line(lambda data=data: cifar.parse_python_batch(data, "b"), "mkdir")
    assert not (tmp_path / "made").exists()


def test_bad_cifar_archive():
    good = archive("bin", binary)
    parse = cifar.parse_archive
    one_line(lambda: parse(good[: len(good) // 2], "c.tar.gz"), "c.tar.gz", "damaged")
    one_line(lambda: parse(b"nothing", "c.tar.gz"), "damaged")
    one_line(lambda: parse(tar({"a/test_batch.bin": b""}), "c"), "no data_batch_1.bin")
    one_line(lambda: parse(tar({"a/readme": b""}), "c"), "no data_batch_1;")


SMALL = 4  # images repeated inside gzip's 32 kB window, so that a whole set packs small


@pytest.fixture
def fake_cifar(tmp_path, monkeypatch):
    """A data folder with a made-up whole CIFAR-10 (registered with its own checksum)."""

    def write(n):
        data = archive("bin", lambda x, y: binary(x, y) * (n // SMALL), SMALL)
        dataset = DATASETS["cifar10"]
        first = dataset.files[0]._replace(size=len(data), sha256=hashlib.sha256(data).hexdigest())
        monkeypatch.setitem(
            DATASETS, "cifar10", dataset._replace(files=(first, *dataset.files[1:]))
        )
        monkeypatch.setenv("QLAB_DATA", str(tmp_path))
        monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "cache"))
        (tmp_path / "cifar10").mkdir()
        (tmp_path / "cifar10/cifar-10-binary.tar.gz").write_bytes(data)

    return write


def test_cifar10_of_another_size_is_refused(fake_cifar):
    fake_cifar(20)
    one_line(lambda: qlab.data.load("cifar10"), "100 + 20 images, expected 50,000 + 10,000")


def test_cifar10_and_its_subset_from_the_whole_archive(fake_cifar, monkeypatch):
    fake_cifar(10_000)
    d = qlab.data.load("cifar10")
    assert d.x_train.shape == (45000, 32, 32, 3)
    assert d.x_test.shape == (10000, 32, 32, 3)
    np.testing.assert_array_equal(d.y_val, np.tile(batch(5, SMALL)[1], 5000 // SMALL))
    np.testing.assert_array_equal(d.x_train[:SMALL], batch(1, SMALL)[0] / np.float32(255))
    one_line(lambda: qlab.data.load("cifar10_subset"), "not those of CIFAR-10's subset")
    digest = hashlib.sha256()
    for part, num in ((1, 8000), (6, 1000)):
        for a in batch(part, SMALL):
            digest.update(a.tobytes() * (num // SMALL))
    monkeypatch.setattr(cifar, "_SUBSET_SHA256", digest.hexdigest())
    s = qlab.data.load("cifar10_subset")
    assert [len(a) for a in s] == [7200, 7200, 800, 800, 1000, 1000]


def test_bad_npz():
    one_line(lambda: cifar.parse_npz(b"PK", "s.npz", ("a",)), "s.npz")
    out = io.BytesIO()
    np.savez(out, a=np.array([{}], dtype=object))
    one_line(lambda: cifar.parse_npz(out.getvalue(), "s.npz", ("a",)), "allow_pickle")
    one_line(lambda: cifar.parse_npz(out.getvalue(), "s.npz", ("b",)), "'b")
    one_line(lambda: cifar.parse_npz(out.getvalue()[:-30], "s.npz", ("a",)), "s.npz")


def test_real_cifar10_subset():
    need("cifar10_subset")
    d = qlab.data.load("cifar10_subset")
    assert [a.shape for a in d[::2]] == [(7200, 32, 32, 3), (800, 32, 32, 3), (1000, 32, 32, 3)]
    # The first labels of CIFAR-10: frog, truck, truck, deer, automobile; cat, ship, ship, airplane.
    assert d.y_train[:5].tolist() == [6, 9, 9, 4, 1]
    assert d.y_test[:4].tolist() == [3, 8, 8, 0]
    # The set's channel means (0.491, 0.482, 0.447) within what 7,200 images allow.
    means = d.x_train.mean((0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(means, [0.4914, 0.4822, 0.4465], atol=0.01)
