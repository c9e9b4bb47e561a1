"""Configs: loading, overriding, hashing, and the one line a mistake gets."""

import json

import pytest

from qlab.lab import config as configs
from qlab.lab.errors import UserError


def error(f, *args):
    with pytest.raises(UserError) as e:
        f(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_load_by_path_name_and_variant(toy):
    assert configs.load(str(toy)).config.steps == 200
    loaded = configs.load(f"{toy}:smoke")
    assert (loaded.config.steps, loaded.variant, loaded.paper) == (40, "smoke", "toy")
    folder = toy.parent / "configs"
    folder.mkdir()
    (folder / "mine.py").write_text(toy.read_text())
    assert configs.load("mine:smoke").config.seeds == 2
    assert configs.load("configs/mine.py").path == (folder / "mine.py").resolve()


def test_errors_name_what_where_and_the_remedy(toy):
    assert "did you mean q_star?" in error(configs.load, "q_sta")
    assert "did you mean q_star?" in error(configs.load, "configs/q_sta.py")
    assert "did you mean smoke?" in error(configs.load, f"{toy}:smok")
    broken = toy.parent / "broken.py"
    broken.write_text("x = 1\ny = x +\n")
    assert "line 2" in error(configs.load, str(broken))
    broken.write_text("x = 1\n\ny = undefined\n")
    assert "line 3" in error(configs.load, str(broken))
    assert "NameError" in error(configs.load, str(broken))
    broken.write_text("x = 1\n")
    assert "no get_config" in error(configs.load, str(broken))
    broken.write_text("def get_config(variant):\n    return {}\n")
    assert "base(experiment=" in error(configs.load, str(broken))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("steps", "7", 7),
        ("lr", "1e-3", 1e-3),
        ("lr", "1", 1.0),
        ("lr", "inf", float("inf")),
        ("half", "true", True),
        ("half", "False", False),
        ("widths", "8,8,8", (8, 8, 8)),
        ("widths", "(1,)", (1,)),
        ("widths", "[2, 3]", (2, 3)),
        ("loop", "step", "step"),
        ("note", "anything goes", "anything goes"),
        ("note", "3", 3),
        ("optimizer.momentum", "0.9", 0.9),
        ("arms.big.lr", "0.3", 0.3),
        ("steps", 9, 9),
    ],
)
def test_override_parses_as_the_type_that_stands_there(toy, key, text, value):
    config = configs.load(str(toy)).config
    configs.override(config, key, text)
    node = config
    for part in key.split("."):
        node = node[part]
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("step", "7", "unknown config key 'step'; did you mean steps?"),
        ("optimiser.momentum", "7", "did you mean optimizer.momentum?"),
        ("optimizer.momentun", "7", "did you mean optimizer.momentum?"),
        ("steps.x", "7", "unknown config key 'steps.x'"),
        ("steps", "1.5", "'steps' wants int (now 200), got 1.5"),
        ("steps", "many", "'steps' wants int (now 200), got 'many'"),
        ("steps", "True", "wants int"),
        ("half", "1", "'half' wants bool"),
        ("lr", "fast", "'lr' wants float"),
        ("widths", "4,x", "'widths' wants tuple"),
        ("widths", "4,1.5", "wants int"),
        (
            "optimizer",
            "adam",
            "'optimizer' is a group; set one of optimizer.name, optimizer.momentum",
        ),
    ],
)
def test_bad_overrides(toy, key, text, words):
    assert words in error(configs.override, configs.load(str(toy)).config, key, text)


def test_an_arm_is_the_config_with_its_overrides(toy):
    config = configs.load(str(toy)).config
    big = configs.arm_config(config, "big")
    assert (big.arm, big.lr, big.optimizer.momentum, big.optimizer.name) == ("big", 0.1, 0.5, "sgd")
    assert config.optimizer.momentum == 0.0
    assert list(config.arms) == ["small", "big"]  # in the order written
    with pytest.raises(AttributeError):
        big.unknown = 1
    config.arms.big.lrr = 3
    assert "unknown config key 'lrr'; did you mean lr?" in error(configs.arm_config, config, "big")
    assert "did you mean small?" in error(configs.arm_config, config, "smal")


def test_hash_is_of_what_changes_numbers(toy):
    def hashed(**changes):
        config = configs.load(str(toy)).config
        for k, v in changes.items():
            configs.override(config, k, v)
        return configs.config_hash(config)

    assert hashed() == hashed(checkpoint_every_s=1.0) == hashed(keep_checkpoints=9)
    assert len({hashed(), hashed(seeds=5), hashed(lr=0.2), hashed(seed=1)}) == 4


def test_first_difference_names_the_key(toy):
    a = json.loads(configs.canonical(configs.load(str(toy)).config))
    b = json.loads(configs.canonical(configs.load(str(toy)).config))
    assert configs.first_difference(a, b) == ""
    b["optimizer"]["momentum"] = 0.7
    b["checkpoint_every_s"] = 1.0
    assert configs.first_difference(a, b) == "optimizer.momentum was 0.0, now 0.7"


def test_grid():
    assert list(configs.grid({"a": (1, 2), "b.c": ("x",)})) == [
        {"a": 1, "b.c": "x"},
        {"a": 2, "b.c": "x"},
    ]
