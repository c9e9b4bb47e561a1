"""The rules of the house, checked on the source: who may import whom, file length, doctests."""

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AREAS = ("nn", "data", "quantization", "search", "rl", "quantum")
# Kernels lie below everything; QTensor itself takes the layout of its packed codes from them.
SHARED = ("qlab.nn", "qlab.data", "qlab.ops", "qlab.quantization.qtensor", "qlab.kernels")
# What an area may take from the runner: the contract, the one-line errors, the cache folder.
FROM_LAB = ("qlab.lab.experiment", "qlab.lab.errors", "qlab.lab.device")
ENTRIES = ("run", "sweep", "report", "bench", "ops")


def sources():
    """Every source file with the dotted name under which it is imported."""
    out = {}
    for folder, prefix in (
        ("qlab", "qlab"),
        ("kernels", "qlab.kernels"),
        ("experiments", "qlab.experiments"),
        ("configs", "qlab.configs"),
    ):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "qlab" and parts[0] in ("kernels", "experiments", "configs"):
                continue  # the links
            out[path] = ".".join([prefix, *parts]).removesuffix(".__init__")
    return out


def imports(path, module):
    """Absolute names of everything a file imports, at any depth of the file."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base]).strip(".")
            if base == "qlab" or (ROOT / base.replace(".", "/")).is_dir():
                yield from (f"{base}.{a.name}" for a in node.names)
            else:
                yield base


def under(name, prefixes):
    return any(name == p or name.startswith(p + ".") for p in prefixes)


def allowed(module, name):
    """Whether `module` may import `name` of qlab ("" if so, else the rule it breaks)."""
    if not under(name, ("qlab",)) or name == "qlab":
        return ""
    room = module.split(".")[1] if "." in module else ""
    if room == "configs":
        return "" if under(name, ("qlab.lab.config",)) else "configs import only qlab.lab.config"
    if under(name, ("qlab.configs",)):
        return "nothing imports a config"
    if room == "experiments":
        if under(name, ("qlab.experiments",)):
            return "two experiments never import each other"
        return (
            "experiments import areas"
            if under(name, tuple(f"qlab.{e}" for e in ENTRIES[:4]))
            else ""
        )
    if under(name, ("qlab.experiments",)):
        return "an experiment is found by name"
    if room == "lab":
        return "" if under(name, ("qlab.lab",)) else "qlab.lab knows no area"
    if room == "kernels":
        return (
            ""
            if under(name, ("qlab.kernels",))
            else "kernels take raw arrays and know nothing of qlab"
        )
    if room == "ops":
        return (
            ""
            if under(name, ("qlab.quantization.qtensor", "qlab.kernels"))
            else "ops joins qtensor with kernels"
        )
    if room in AREAS:
        ok = (f"qlab.{room}", *SHARED, *FROM_LAB)
        return "" if under(name, ok) else "areas do not import one another"
    return ""


def test_imports_run_downwards():
    broken = []
    for path, module in sources().items():
        for name in imports(path, module):
            if why := allowed(module, name):
                broken.append(f"{path.relative_to(ROOT)} imports {name}: {why}")
            if name.split(".")[0] in ("kernels", "experiments", "configs"):
                broken.append(f"{path.relative_to(ROOT)} imports {name}: always import qlab.{name}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "name", "fine"),
    [
        ("qlab.rl.arsq", "qlab.search.queue", False),
        ("qlab.rl.arsq", "qlab.quantization.qtensor", True),
        ("qlab.rl.arsq", "qlab.quantization.rounding", False),
        ("qlab.lab.loop", "qlab.nn.zoo", False),
        ("qlab.lab.loop", "qlab.lab.records", True),
        ("qlab.experiments.arsq", "qlab.experiments.q_star", False),
        ("qlab.experiments.arsq", "qlab.rl.arsq", True),
        ("qlab.configs.arsq", "qlab.experiments.arsq", False),
        ("qlab.kernels.int4.api", "qlab.quantization.qtensor", False),
        ("qlab.quantization.qtensor", "qlab.kernels.common.layout", True),
        ("qlab.ops", "qlab.kernels.int4.api", True),
        ("qlab.ops", "qlab.nn.zoo", False),
    ],
)
def test_the_rule_itself(module, name, fine):
    assert (allowed(module, name) == "") == fine


def test_layout():
    top = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert {
        "pyproject.toml",
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "LICENSE",
        "qlab",
        "kernels",
        "experiments",
        "configs",
        "tests",
        "notebooks",
    } <= top
    for name in ("kernels", "experiments", "configs"):
        link = ROOT / "qlab" / name
        assert link.is_symlink()
        assert str(link.readlink()) == f"../{name}"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_files_are_one_idea_long():
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources()
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long
    long = {
        p.name: n
        for p in (ROOT / "experiments").glob("*.py")
        if (n := len(p.read_text().splitlines())) > 150
    }
    assert not long


def test_every_experiment_has_a_config_and_a_readme_row():
    papers = {p.stem for p in (ROOT / "experiments").glob("*.py")}
    assert papers == {p.stem for p in (ROOT / "configs").glob("*.py")}
    readme = (ROOT / "README.md").read_text()
    assert not [p for p in papers if f"configs/{p}.py" not in readme]


def test_nothing_names_a_machine_or_an_index():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a checkout")
    assert not [f for f in files.stdout.split() if f.endswith(("uv.lock", "poetry.lock"))]
    # Spelt so that this line is not what it looks for.
    folders = "|".join(("root", "home", "work"))
    pattern = re.compile(rf"index[-]url|/[s]imple[\"/\s]|(?<![\w.])/({folders})/\w")
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in (".py", ".toml", ".md", ".txt", ".yaml", ".ipynb", "") and path.is_file():
            found = pattern.search(path.read_text(errors="ignore"))
            assert not found, f"{name}: {found and found.group()}"


DOCTESTED = [m for p, m in sources().items() if ">>> " in p.read_text()]


@pytest.mark.rotates(2)
@pytest.mark.parametrize("module", DOCTESTED)
def test_doctests(module):
    done = doctest.testmod(
        importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert done.attempted
    assert not done.failed


def test_importing_qlab_is_light():
    code = (
        "import sys, qlab\n"
        "import qlab.lab.config, qlab.lab.claims, qlab.lab.records, qlab.lab.experiment, qlab.data\n"
        "heavy = {'jax', 'pennylane', 'matplotlib', 'sklearn', 'flax', 'optax', 'orbax'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
