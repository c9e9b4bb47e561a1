"""Where files are looked for, what is checked, and what each failure says."""

import gzip
import hashlib
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

import qlab.data
from qlab.data import __main__ as command
from qlab.data.files import cache_dir, check, find, first_here, read
from qlab.data.registry import DATASETS, DataSet, File
from qlab.lab.errors import UserError

BODY = bytes(range(256)) * 40
CONTENT = b"\0\0\x08\x01\0\0\0\x03abc"


def sha(data):
    return hashlib.sha256(data).hexdigest()


def plain(*urls):
    return DataSet("box", "about", "origin", "MIT", (File("a/x.bin", len(BODY), sha(BODY)),), urls)


def zipped(*urls):
    gz = gzip.compress(CONTENT)
    f = File("x-ubyte.gz", len(gz), sha(gz), len(CONTENT), sha(CONTENT))
    return DataSet("box", "about", "origin", "MIT", (f,), urls)


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """An empty $QLAB_DATA and an empty cache."""
    monkeypatch.setenv("QLAB_DATA", str(tmp_path / "given"))
    monkeypatch.setenv("QLAB_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def web():
    """A web server on this machine: web.pages[path] = (body, claimed length)."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.asked.append(self.path)
            body, length = server.pages.get(self.path, (b"", None))
            self.send_response(404 if length is None else 200)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.pages, server.asked = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def put(place, data):
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    return place


def one_line(call, *parts):
    with pytest.raises(UserError) as e:
        call()
    line = str(e.value)
    assert "\n" not in line
    for part in parts:
        assert part in line, line
    return line


def test_data_folder_comes_before_cache_and_cache_before_network(places, web):
    dataset = plain(web.url)
    in_cache = put(places / "cache/data/box/a/x.bin", BODY)
    assert read(dataset, "a/x.bin") == (BODY, str(in_cache))
    given = put(places / "given/box/a/x.bin", BODY)
    assert read(dataset, "a/x.bin") == (BODY, str(given))
    assert web.asked == []


def test_download_is_checked_and_kept(places, web):
    web.pages["/a/x.bin"] = (BODY, len(BODY))
    data, where = read(plain(web.url), "a/x.bin")
    assert data == BODY
    assert where == str(places / "cache/data/box/a/x.bin")
    web.pages.clear()
    assert read(plain(web.url), "a/x.bin")[0] == BODY


def test_second_address_is_tried(places, web):
    web.pages["/good/a/x.bin"] = (BODY, len(BODY))
    assert read(plain(web.url + "gone/", web.url + "good/"), "a/x.bin")[0] == BODY
    assert web.asked == ["/gone/a/x.bin", "/good/a/x.bin"]


@pytest.mark.parametrize(
    ("body", "length", "says"),
    [
        (BODY[:-7], len(BODY), ""),  # the connection breaks: whatever the library calls it
        (BODY[:-7], len(BODY) - 7, "other bytes"),
        (BODY[:-1] + b"!", len(BODY), "other bytes"),
        (b"", None, "status 404"),
    ],
    ids=["broken", "short", "altered", "gone"],
)
def test_bad_download_leaves_no_file(places, web, body, length, says):
    web.pages["/a/x.bin"] = (body, length)
    one_line(
        lambda: read(plain(web.url), "a/x.bin"),
        "box/a/x.bin",
        "QLAB_DATA",
        "network",
        web.url,
        says,
    )
    assert [p for p in (places / "cache").rglob("*") if p.is_file()] == []
    web.pages["/a/x.bin"] = (BODY, len(BODY))
    assert read(plain(web.url), "a/x.bin")[0] == BODY


def test_offline_and_absent_names_both_remedies(places):
    # Nothing listens on port 9 of this machine.
    line = one_line(
        lambda: read(plain("http://127.0.0.1:9/"), "a/x.bin"),
        f"set QLAB_DATA (now {places / 'given'}) to a folder that holds box/a/x.bin",
        "run once with network",
    )
    assert len(line) < 400


def test_offline_with_qlab_data_unset(monkeypatch):
    monkeypatch.delenv("QLAB_DATA")
    one_line(lambda: read(plain("http://127.0.0.1:9/"), "a/x.bin"), "QLAB_DATA (now not set)")


def test_absent_without_any_address():
    one_line(lambda: read(plain(), "a/x.bin"), "QLAB_DATA", "cannot be downloaded")


@pytest.mark.parametrize("place", ["given/box/a/x.bin", "cache/data/box/a/x.bin"])
@pytest.mark.parametrize(
    ("data", "says"),
    [
        (BODY[:100], "100 bytes, expected 10,240 (truncated or altered)"),
        (BODY + b"x", "10,241 bytes, expected 10,240"),
        (b"", "0 bytes"),
        (b"!" + BODY[1:], sha(BODY)),
    ],
    ids=["truncated", "trailing", "empty", "altered"],
)
def test_truncated_or_altered_file(places, web, place, data, says):
    path = put(places / place, data)
    one_line(lambda: read(plain(web.url), "a/x.bin"), str(path), says, "run once with network")
    one_line(lambda: read(plain(), "a/x.bin"), str(path), says, "put a good copy")
    assert web.asked == []  # a bad file of the user's is never passed over in silence
    assert path.read_bytes() == data


def test_a_folder_in_the_place_of_a_file(places):
    (places / "given/box/a/x.bin").mkdir(parents=True)
    one_line(lambda: read(plain(), "a/x.bin"), "cannot read", "x.bin")


@pytest.mark.parametrize("level", [1, 9])
def test_any_gzip_wrapper_of_the_right_contents(places, level):
    put(places / "given/box/x-ubyte.gz", gzip.compress(CONTENT, level, mtime=level))
    assert read(zipped(), "x-ubyte.gz")[0] == CONTENT


def test_gunzipped_file_is_accepted(places):
    path = put(places / "given/box/x-ubyte", CONTENT)
    assert read(zipped(), "x-ubyte.gz") == (CONTENT, str(path))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (gzip.compress(CONTENT)[:-9], "not a whole gzip"),
        (gzip.compress(CONTENT)[:20] + b"\xff" + gzip.compress(CONTENT)[21:], ""),
        (CONTENT, "not a whole gzip"),
        (gzip.compress(CONTENT + b"x"), "12 bytes, expected 11"),
        (gzip.compress(CONTENT[:-1]), "10 bytes, expected 11"),
        (gzip.compress(CONTENT[:-1] + b"x"), sha(CONTENT)),
    ],
    ids=["cut", "damaged", "no gzip", "trailing", "short", "altered"],
)
def test_bad_gzip(places, data, says):
    path = put(places / "given/box/x-ubyte.gz", data)
    one_line(lambda: read(zipped(), "x-ubyte.gz"), str(path), says)


def test_a_gzip_bomb_is_not_unpacked_whole(places):
    put(places / "given/box/x-ubyte.gz", gzip.compress(bytes(100_000_000), 1))
    one_line(lambda: read(zipped(), "x-ubyte.gz"), "12 bytes, expected 11")


def test_first_here(places, monkeypatch):
    derived = plain()._replace(folder="derived")
    monkeypatch.setitem(DATASETS, "derived", derived)
    monkeypatch.setitem(DATASETS, "full", plain("http://127.0.0.1:9/"))
    both = ("derived", "a/x.bin"), ("full", "a/x.bin")
    assert first_here(*both)[0].folder == "box"  # none here: the one that can be downloaded
    put(places / "given/derived/a/x.bin", BODY)
    assert first_here(*both)[0].folder == "derived"
    put(places / "given/box/a/x.bin", BODY)
    assert first_here(*both)[0].folder == "derived"


def test_cache_dir_is_private_and_inside(places):
    path = cache_dir("zoo/mlp")
    assert path == places / "cache/zoo/mlp"
    for p in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(p.stat().st_mode) == 0o700
    assert cache_dir("zoo/mlp") == path
    one_line(lambda: cache_dir("../out"), "'..'")
    one_line(lambda: cache_dir("/etc"), "relative")


def test_cache_dir_that_cannot_be_made(places, monkeypatch):
    put(places / "file", b"")
    monkeypatch.setenv("QLAB_CACHE", str(places / "file"))
    one_line(lambda: cache_dir("zoo"), "QLAB_CACHE")
    one_line(cache_dir, "QLAB_CACHE")


def test_default_cache_is_the_platforms(monkeypatch, places):
    monkeypatch.delenv("QLAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(places / "xdg"))
    monkeypatch.setenv("HOME", str(places))
    assert cache_dir("zoo").parts[-2:] == ("qlab", "zoo")
    assert places in cache_dir("zoo").parents


def test_check_returns_the_data():
    assert check(BODY, len(BODY), sha(BODY), "x", "r") is BODY


def test_registry_is_well_formed():
    for key, d in DATASETS.items():
        paths = [f.path for f in d.files]
        assert len(set(paths)) == len(paths) > 0, key
        assert all(u.startswith("http") and u.endswith("/") for u in d.urls), key
        for f in d.files:
            shas = [f.sha256] + ([f.content_sha256] if f.content_size else [])
            assert all(len(s) == 64 and set(s) <= set("0123456789abcdef") for s in shas)
            assert f.size > 0
            assert bool(f.content_size) == f.path.endswith("ubyte.gz")


def test_every_name_has_a_description_and_a_way_to_get_it():
    for name in qlab.data.names():
        text = qlab.data.describe(name)
        assert text.startswith(name + "\n  about ")
        used = qlab.data.files(name)
        assert (used is None) == (
            name in ("digits", "digits16", "digits_vqa", "selective_copy")
        )  # without files
        if used:  # nothing is here, so what is shown must be what a download brings
            assert DATASETS[used[0]].urls
            assert "licence" in text
            assert text.count("not here") == len(used[1])
            assert find(DATASETS[used[0]], used[1][0]) is None


def test_unknown_name_and_option():
    one_line(lambda: qlab.data.load("minst"), "'minst'", "did you mean mnist?")
    one_line(lambda: qlab.data.describe("zzz"), "no data set")
    one_line(lambda: qlab.data.load("digits", seed=1), "no option 'seed'")
    one_line(lambda: qlab.data.load("molecule", encodin="bk"), "did you mean encoding?")
    one_line(lambda: qlab.data.load("h2_sto3g_jw", encoding="bk"), "no option 'encoding'")


def test_import_brings_neither_jax_nor_scikit_learn_nor_pooch():
    code = (
        "import sys, qlab.data; qlab.data.names();"
        "print([m for m in ('jax', 'sklearn', 'pooch', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_command_line(capsys, monkeypatch, places, web):
    monkeypatch.setitem(DATASETS, "tiny_shakespeare", plain(web.url))
    assert command.main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in qlab.data.names())
    assert command.main(["tiny_shakespeare", "--get"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    web.pages["/a/x.bin"] = (BODY, len(BODY))
    assert command.main(["tiny_shakespeare", "--get"]) == 0
    assert str(places / "cache/data/box/a/x.bin") in capsys.readouterr().out
    assert command.main(["nonsense"]) == 2
