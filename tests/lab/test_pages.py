"""The pages: what they show, that everything is escaped, self-contained and deterministic."""

import html.parser
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from test_report_factory import ARMS, CLAIMS, METRICS, make_run, make_sweep

from qlab.lab import ablation, figures, pages, plots, reading, stats, svg
from qlab.lab.experiment import Figure
from qlab.lab.plots import Line

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert(1)</script>"


class Page(html.parser.HTMLParser):
    """Tags in order, visible text, and whether every element is closed by its own end tag."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open, self.ids = [], [], [], []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())

    def count(self, tag):
        return sum(t == tag for t, _ in self.tags)


@pytest.fixture(scope="module")
def run_page(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("runs") / "run", diverged={"rtn": {"1": 340}})
    return run, pages.write_page(run).read_text()


def test_order_and_content(run_page):
    run, text = run_page
    page = Page(text)
    words = page.words
    marks = ["python -m qlab.run --config", "Claims", CLAIMS[0].text, "Figures", "Results", "Learning curves", "How it was made", "Config"]  # fmt: skip
    at = [words.index(m) for m in marks]
    assert at == sorted(at)
    for shown in ("the paper: 12.5", "Table 2", "Digits, not ImageNet.", "1 of 5 seeds non-finite in rtn", "seed 1 at step 340", "3 min 23 s", "0123456789", "jax 0.10.2", "3f9ac0ffee", "not measured in this variant"):  # fmt: skip
        assert shown in words, shown
    verdicts = json.loads((run / "claims.json").read_text())
    for v in verdicts:
        assert v["text"] in words
        assert stats.format_span(v["estimate"], v["low"], v["high"]) in words or v["n"] == 0


def test_numbers_are_the_mean_and_interval_of_the_rows(run_page):
    run, text = run_page
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    values = [
        r["value"]
        for r in rows
        if (r["arm"], r["task"], r["metric"]) == ("flexround", "w2", "accuracy")
    ]
    half = 2.7764451 * np.std(values, ddof=1) / np.sqrt(5)  # t quantile of 4 degrees of freedom
    assert f"{np.mean(values):.1f} ± {half:.1f}" in Page(text).words


def test_self_contained_and_accessible(run_page):
    page = Page(run_page[1])
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        assert "src" not in attrs
        for name in ("href", "xlink:href"):
            assert attrs.get(name, "#").startswith(("#", "data:image/png;base64,"))
        if tag == "th":
            assert attrs.get("scope") in ("col", "row")
        if attrs.get("role") == "img":
            assert len(attrs["aria-label"]) > 10
    assert len(page.ids) == len(set(page.ids))
    assert page.count("figure") == page.count("figcaption") == 5
    assert page.count("table") == page.count("caption") > 3
    assert page.count("h1") == page.count("main") == 1
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [
        a for _, a in page.tags
    ]
    assert "prefers-color-scheme: dark" in run_page[1]
    assert "@import" not in run_page[1]


def test_contrast_of_text_in_both_themes():
    css = (pages.TEMPLATES / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    assert len(blocks) == 2
    for block in blocks:
        colour = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        pairs = [
            ("fg", "bg"),
            ("fg", "card"),
            ("muted", "bg"),
            ("muted", "card"),
            ("accent", "card"),
        ]
        pairs += [(k, f"{k}-bg") for k in ("good", "bad", "open")] + [
            ("fg", "bad-bg"),
            ("fg", "open-bg"),
        ]
        for a, b in pairs:
            assert _contrast(colour[a], colour[b]) >= 4.5, (a, b)
        for i in range(8):
            assert _contrast(colour[f"s{i}"], colour["card"]) >= 3, i


def _contrast(a, b):
    def luminance(c):
        x = np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_the_same_files_give_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run", tasks=("w2",), seeds=3)
    first = pages.write_page(run).read_bytes()
    assert pages.write_page(run).read_bytes() == first


def test_hostile_names_are_escaped_everywhere(tmp_path):
    arms = ("rtn", "<script>x<!--", "a$\\frac$b", '"onload="x')
    evil = tuple(c._replace(text=EVIL, source=EVIL, note=EVIL) for c in CLAIMS)
    evil += (CLAIMS[0]._replace(left=(arms[1], "w2/accuracy")),)
    shown = tuple(Figure(EVIL, k, y, xlabel=EVIL, ylabel=EVIL) for k, y in (("curve", "loss"), ("bars", "accuracy"), ("line", "accuracy_of_n"), ("heatmap", "decisions")))  # fmt: skip
    metrics = {k: m._replace(unit=EVIL, text=EVIL) for k, m in METRICS.items()}
    run = make_run(tmp_path / "run", arms=arms, tasks=(EVIL.replace("/", "|"), "w2"), seeds=3, claims_=evil, figures=shown, metrics=metrics, config={EVIL: EVIL}, diverged={arms[1]: {0: 1}})  # fmt: skip
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= dict.fromkeys(("title", "device", "commit", "started", "platform"), EVIL)
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "command.txt").write_text(EVIL)
    sweep = make_sweep(tmp_path / "sweep", {EVIL: [EVIL, "b"]}, [({EVIL: EVIL}, 0), ({EVIL: "b"}, 0)], arms=arms, figures=(), tasks=("w2",), seeds=2, broken=(1,))  # fmt: skip
    index = pages.write_index([run], tmp_path / "i.html", sweeps=[reading.load_sweep(sweep)])
    for file in (pages.write_page(run), index):
        page = Page(file.read_text())
        assert page.count("script") == 1  # ours
        assert not any(k.startswith("on") for _, attrs in page.tags for k in attrs)
        assert "<script>" in page.words  # shown as text
        assert arms[1] in page.words


def test_wide_studies_stay_small_and_say_what_is_left_out(tmp_path):
    arms, tasks = [f"method_{i}" for i in range(14)], [f"w{i}_tensor" for i in range(15)]
    metrics = dict.fromkeys(("accuracy", "layer_mse", "c", "d", "e", "f"), METRICS["accuracy"])
    run = make_run(tmp_path / "run", arms=arms, tasks=tasks, seeds=3, metrics=metrics, claims_=())
    text = pages.write_page(run).read_text()
    page = Page(text)
    assert len(text) < 2_000_000
    assert "further rows are in results.jsonl" in page.words
    assert "Bands are left out" in page.words
    assert page.words.index("accuracy: test accuracy") < page.words.index("layer_mse")


def test_svg_text_colours_and_ids():
    line = Line(np.arange(3.0), np.array([1.0, 2, 4]), np.array([0.5, 1, 3]), np.array([2.0, 3, 5]))
    made = plots.lines_plot(
        "t", {"$a_1$": line, "b & <c>": line}, plots.styles(["$a_1$", "b & <c>"]), logy=True
    )
    root = ET.fromstring(made.svg)  # well formed
    texts = ["".join(t.itertext()) for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"$a_1$", "b & <c>"} <= set(texts)  # not typeset as mathematics, not as paths
    assert not any("mathdefault" in t for t in texts)
    assert "var(--s0)" in made.svg
    assert "var(--s1)" in made.svg
    assert not re.search(r"#0[0b]0[01c]\w\w", made.svg)  # no placeholder is left
    assert re.findall(r"(?:fill|stroke): (#\w+)", made.svg) in (
        [],
        ["#ffffff"],
    )  # nothing fixed to a theme
    one, two = (svg.own_ids(made.svg, p) for p in ("p-", "q-"))
    ids = re.findall(r' id="([^"]+)"', one + two)
    assert len(ids) == len(set(ids))
    for href in re.findall(r'(?:url\(#|href="#)([^)"]+)', one):
        assert f' id="{href}"' in one


def test_curve_line_is_mean_and_band_over_seeds():
    rows = [
        {"step": s, "seed": k, "metrics": {"loss": v}}
        for s, vs in ((1, (1, 2, 3)), (2, (4, 4, None)))
        for k, v in enumerate(vs)
    ]
    line = figures.curve_line(rows, "loss")
    assert line.x.tolist() == [1, 2]
    assert line.mean.tolist() == [2, 4]
    np.testing.assert_allclose(line.high, [2 + 4.3026527 / np.sqrt(3), 4], rtol=1e-6)
    assert figures.curve_line(rows, "other") is None


def test_long_curves_are_thinned_but_keep_their_ends():
    rows = [{"step": s, "seed": 0, "metrics": {"loss": float(s)}} for s in range(1, 5001)]
    line = figures.curve_line(rows, "loss")
    assert line.x.size <= figures.MAX_POINTS
    assert (line.x[0], line.x[-1]) == (1, 5000)


@pytest.mark.parametrize(
    ("y", "x", "want"), [("v", "", [0, 1]), ("v", "u", [2, 4]), ("w", "", [0, 1, 2])]
)
def test_array_line(y, x, want):
    arrays = {
        "v": np.array([[1.0, 2], [3, 4], [np.nan, 6]]),
        "u": np.array([[2.0, 4]] * 3),
        "w": np.arange(3.0),
    }
    line = figures.array_line(arrays, y, x)
    assert line.x.tolist() == want
    assert line.mean.tolist() == ([2, 4] if y == "v" else [0, 1, 2])


def test_a_line_may_stand_against_the_diagonal(tmp_path):
    for diagonal in (False, True):
        shown = (Figure("Of n", "line", "accuracy_of_n", "n", diagonal=diagonal),)
        run = make_run(tmp_path / str(diagonal), seeds=2, figures=shown)
        assert ("grey line is y = x" in Page(pages.write_page(run).read_text()).words) is diagonal
    line = Line(np.arange(1.0, 4.0), *[np.array([4.0, 2.0, 5.0])] * 3)
    made = plots.lines_plot("t", {"a": line}, plots.styles(["a"]), diagonal=True).svg

    def points(mark):
        path = re.search(mark + r'"[^>]*><path d="([^"]+)"', made)
        return np.array(re.findall(r"[ML] (\S+) (\S+)", path[1]), float)

    (a, b), (_, through, _) = points("diagonal"), points("arm-0-0")
    u, v = b - a, through - a  # the arm's middle point is (2, 2)
    assert abs(u[0] * v[1] - u[1] * v[0]) < 1e-3 * np.hypot(*u)


def test_figures_that_cannot_be_drawn_say_why(tmp_path):
    shown = (
        Figure("Missing", "line", "nothing"),
        Figure("Flat", "heatmap", "accuracy_of_n"),
        Figure("None", "curve", "nothing"),
    )
    run = make_run(tmp_path / "run", seeds=2, tasks=("w2",), figures=shown)
    words = Page(pages.write_page(run).read_text()).words
    for title in ("Missing", "Flat", "None"):
        assert f"Not drawn. {title}: no arm" in words


def test_every_kind_of_plot_survives_odd_data():
    nan = np.full(3, np.nan)
    line = Line(np.arange(3.0), nan, nan, nan)
    style = plots.styles(["a", "b"])
    assert "<svg" in plots.lines_plot("t", {"a": line, "b": line}, style, logx=True, logy=True).svg
    cells = stats.collect([{"arm": "a", "metric": "m", "seed": 0, "value": None}])
    assert "<svg" in plots.bars_plot("t", cells, {"": "m"}, ["a"], style).svg
    assert "<svg" in plots.heatmap_plot("t", {"a": np.full((2, 2), np.nan)}).svg
    assert "<svg" in plots.heatmap_plot("t", {f"{i}": np.ones((2, 2)) for i in range(20)}).svg


def test_index_claims_comparison_and_links(tmp_path):
    runs = [make_run(tmp_path / "a", seeds=3), make_run(tmp_path / "b c", seeds=5, shift=-4, config={"bits": 2}, started="2031-06-01T00:00:00")]  # fmt: skip
    runs.append(make_run(tmp_path / "s", seeds=2, variant="smoke", started="2032-01-01T00:00:00"))
    pages.write_page(runs[1])
    text = pages.write_index(runs, tmp_path / "out" / "index.html").read_text()
    page = Page(text)
    links = [a["href"] for t, a in page.tags if t == "a"]
    assert "../b%20c/report.html" in links
    assert not any("/a/" in link for link in links)  # it has no page yet
    assert "3 runs" in page.words
    assert "bits: 3, 2, 3" in page.words
    assert page.words.index(CLAIMS[0].text) < page.words.index("Runs")
    verdicts = [v["verdict"] for v in json.loads((runs[1] / "claims.json").read_text())]
    head = [a["data-verdict"] for t, a in page.tags if "data-verdict" in a]
    assert sorted(head) == sorted(verdicts)  # the latest standard run's, not the smoke run's


def test_explain_table_is_the_paired_change(tmp_path):
    trials = [({}, 0.0), ({"ties": "up"}, 0.0), ({"symmetric": True}, -5.0)]
    folder = make_sweep(
        tmp_path / "sweep",
        {},
        trials,
        explain=True,
        arms=ARMS[1:],
        tasks=("w2",),
        seeds=4,
        figures=(),
    )
    sweep = reading.load_sweep(folder)
    shown = ablation.view(sweep, lambda run: "")["explain"]
    table = shown["tables"][0]
    assert [row["name"] for row in table["rows"]] == [
        "symmetric = true",
        "ties = up",
    ]  # largest first
    base, trial = sweep.runs["trial_000"].cells, sweep.runs["trial_002"].cells
    got = table["rows"][0]["cells"][-1]
    diff = [
        trial["flexround", "w2/accuracy"].values[s] - base["flexround", "w2/accuracy"].values[s]
        for s in range(4)
    ]
    np.testing.assert_allclose(got["v"], np.mean(diff))
    assert got["cls"] == "moves"
    assert table["rows"][1]["cells"][-1]["cls"] == ""
    assert len(shown["plots"]) == 1


def test_axes_average_over_the_other_axes(tmp_path):
    axes = {"bits": [2, 3], "rule": ["even", "up"]}
    trials = [
        ({"bits": b, "rule": r}, 10.0 * b + (r == "up")) for b in (2, 3) for r in ("even", "up")
    ]
    folder = make_sweep(
        tmp_path / "sweep",
        axes,
        trials,
        arms=("rtn", "ours"),
        tasks=("w2",),
        seeds=3,
        figures=(),
        broken=(3,),
    )
    sweep = reading.load_sweep(folder)
    shown = ablation.view(sweep, lambda run: "")
    assert [a["name"] for a in shown["axes"]] == ["bits", "rule"]
    row = shown["axes"][0]["tables"][0]["rows"][0]
    cells = [sweep.runs[t].cells["ours", "w2/accuracy"].values for t in ("trial_000", "trial_001")]
    want = np.mean([[c[s] for s in range(3)] for c in cells])
    assert row["name"] == "2"
    np.testing.assert_allclose(row["cells"][1]["v"], want)
    assert "2: 2, 3: 1" in shown["axes"][0]["text"]  # one trial failed: said
    assert "at most 8" in shown["problems"][0]
    assert "python -m qlab.run" in shown["problems"][0]
    assert len(shown["trials"]["rows"]) == 4


def test_what_scrolls_sideways_keeps_hidden_words_inside():
    """Words for screen readers are placed absolutely: out of a box without a position they widen the page."""
    css = (Path(pages.__file__).parent / "templates" / "style.css").read_text()
    for box in (".scroll", ".draw"):
        (rule,) = [x for x in css.splitlines() if x.startswith(f"{box} {{") and "auto" in x]
        assert "position: relative" in rule
