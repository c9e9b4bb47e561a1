"""The small VLM and DigitsVQA: questions that do not see one another, answers that are true, sites by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlab import data
from qlab.data.vqa import LOOPS, NUMBERS, QUESTIONS, VOCABULARY
from qlab.nn import zoo
from qlab.nn.vlm import VLMSize, vlm

SIZE = VLMSize(vision_dim=8, vision_depth=1, vision_heads=2, dim=16, depth=1, hidden=24)


def test_each_question_has_the_answer_it_has_alone():
    net = vlm(SIZE)
    apply = jax.jit(net.apply)
    rng = np.random.default_rng(0)
    leaves, tree = jax.tree.flatten(jax.eval_shape(net.init, jax.random.key(0)))
    params = jax.tree.unflatten(
        tree, [0.3 * rng.standard_normal(a.shape, np.float32) for a in leaves]
    )
    x = {
        "image": jnp.asarray(rng.random((2, 8, 8, 1)), jnp.float32),
        "question": jnp.asarray(rng.integers(0, 20, (2, 3, 5)), jnp.int32),
    }
    whole = np.asarray(apply(params, x))
    assert whole.shape == (2, 3, 32)
    for i in range(3):
        alone = apply(params, {**x, "question": x["question"][:, i : i + 1]})
        np.testing.assert_allclose(alone[:, 0], whole[:, i], atol=1e-5)
    other = apply(params, {**x, "image": x["image"][::-1]})
    assert np.abs(np.asarray(other) - whole).max() > 1e-3  # and the picture matters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": 3}, "patch=3 must divide image=8"),
        ({"question": 0}, "question=0"),
        ({"kv_heads": 3}, "kv_heads=3"),
    ],
)
def test_sizes_that_do_not_exist(change, message):
    with pytest.raises(ValueError, match=message):
        vlm(SIZE._replace(**change))


def test_answers_are_true_of_the_digits():
    s, d = data.load("digits_vqa"), data.load("digits")
    assert len(VOCABULARY) < 40
    np.testing.assert_array_equal(s.x_val["image"], d.x_val)
    say = np.array(VOCABULARY)
    for y, told in ((d.y_train, s.y_train), (d.y_test, s.y_test)):
        words = dict(zip(QUESTIONS, say[told].T, strict=True))
        assert words["digit"].tolist() == [NUMBERS[i] for i in y]
        assert words["next"].tolist() == [NUMBERS[(i + 1) % 10] for i in y]
        assert words["odd"].tolist() == ["yes" if i % 2 else "no" for i in y]
        assert words["above"].tolist() == ["yes" if i > 4 else "no" for i in y]
        assert words["loops"].tolist() == [NUMBERS[LOOPS[i]] for i in y]
    texts = {" ".join(say[q]) for q in s.x_train["question"][7]}
    assert texts == {t for t, _ in QUESTIONS.values()}
    assert (s.x_train["question"] == s.x_train["question"][0]).all()


def test_the_zoo_knows_the_families():
    for name in ("digits_vlm", "digits_vlm_small", "text_gpt"):
        r = zoo.recipe(name)
        net = zoo.model(r.kind, r.widths)
        assert net.groups[-1].name == "head"
    assert zoo.recipe("digits_vlm").widths == tuple(VLMSize())


@pytest.mark.slow
def test_the_small_net_learns_the_easy_questions(tmp_path):
    net, params = zoo.train("digits_vlm_small", jax.random.key(0), cache=tmp_path)
    s = data.load("digits_vqa")
    right = np.asarray(jax.jit(net.apply)(params, s.x_val).argmax(-1)) == s.y_val
    assert right.mean() > 0.5  # always saying the commonest answer: 0.36
    again = zoo.train("digits_vlm_small", jax.random.key(0), cache=tmp_path)[1]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
