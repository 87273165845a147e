"""docs/plots and docs/accuracy.md show the newest records, the plots' titles are true, and accuracy.py measures."""

import json
import pathlib
import re
from xml.etree import ElementTree

import numpy as np
import oracle
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDS, PICTURES = (ROOT / "docs" / folder for folder in ("benchmarks", "pictures"))

pytest.importorskip("matplotlib").use("svg")


def texts(path):
    """The words in a picture, and in its metadata the record with its digest. Lines and ticks differ by matplotlib."""
    elements = ElementTree.parse(path).getroot().iter()
    found = {(e.text or "").strip() for e in elements if e.tag.rpartition("}")[2] in ("text", "tspan", "source")}
    return {text for text in found if re.search("[A-Za-z]{3}", text)}


@pytest.mark.exhaustive
def test_the_pictures_show_the_newest_records(script, tmp_path):
    """After a new record: make plots"""
    drawn = {path.name: texts(path) for path in script("plots").draw(tmp_path)}
    assert drawn == {path.name: texts(path) for path in (ROOT / "docs" / "plots").glob("*.svg")}
    assert len(drawn) >= 8
    pages = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    assert [name for name in drawn if f'plots/{name}"' not in pages] == []


@pytest.mark.skipif(not PICTURES.exists(), reason="no docs/ beside the tests: these are of an installed package")
def test_the_examples_draw_the_pictures():
    """After a change: make pictures"""
    sources = "".join(path.read_text() for path in (ROOT / "examples").glob("*.py"))
    names = {"report", *re.findall(r'save\("(\w+)"', sources)}
    found = {path.name: path for path in PICTURES.iterdir()}
    assert set(found) == {f"{name}-{kind}.svg" for name in names for kind in ("light", "dark")}
    assert max(path.stat().st_size for path in found.values()) < 150_000
    pages = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    assert [name for name in found if f'"pictures/{name}"' not in pages] == []


def test_the_page_is_up_to_date(script):
    """After a new record: make plots"""
    text = (ROOT / "docs" / "accuracy.md").read_text()
    assert script("plots").page(text) == text


def test_titles_are_true(script):
    plots = script("plots")
    record = json.loads(plots.newest_accuracy(RECORDS).read_text())
    about = record["elementary"]
    for name, errors in about["ulp"].items():
        assert np.nanmax(plots.array(errors["klcore"])) <= about["bounds"][name.split()[1]]
    about = record["divergence"]
    for space in ("probs", "log_probs", "logits"):
        for dtype in ("float32", "float64"):
            found = about[f"{space} {dtype}"]
            for what in {"values", "gradients"} & set(found):
                ours = found[what]["klcore"]
                bound = about["bounds"][what][dtype]
                if "formulas" in found:  # klcore's error, and what its formula misses of rows that do not add up to one
                    bound = bound + plots.array(found["formulas"][plots.DIVERGENCE]["worst"])
                worst = plots.array(ours["worst"])
                assert (~(worst > bound)).all()
                assert sum(ours.get("negative", [])) == sum(ours["not finite"]) == 0
                assert (np.array(found["pairs"]) > 0).sum() >= 16


def test_the_front_page_is_true(script):
    plots = script("plots")
    record = json.loads(max(RECORDS.glob("close-*.json")).read_text())
    exact, returned = np.array(record["exact"]), record["returned"]
    assert set(returned) == {"klcore", "NumPy", "PyTorch"}
    np.testing.assert_allclose(returned["klcore"], exact, rtol=4e-6)
    for name in ("NumPy", "PyTorch"):
        errors = np.abs(np.array(returned[name]) / exact - 1)
        assert np.median(errors[exact < plots.LOST]) > 1 > errors[exact > 10 * plots.LOST].max()


def test_a_record_of_a_gpu_is_drawn(script, tmp_path):
    def case(space, outputs, percents):
        contenders = [{"name": k, "percent of copy": v, "wrong": k == "JAX jit"} for k, v in percents.items()]
        contenders.append({"name": "Absentee", "absent": "not installed"})
        return {"rows": 2, "n": 3, "dtype": "float32", "space": space, "outputs": outputs, "contenders": contenders}

    cases = [
        case("probs", "value", {"klcore": 80.0}) | {"contenders": [{"name": "klcore", "percent of copy": 1.0}]},
        case("probs", "value", {"klcore": 80.0, "torch eager": 10.0, "JAX jit": 20.0}),
        case("logits", "value+dy", {"klcore": 50.0, "torch eager": 5.0}),
        case("logits", "value+dy", {"klcore": 1.0, "torch eager": 5.0}) | {"rows": 4},
    ]
    record = {"benchmark": {"cases": cases}, "emulated": False, "date": "2027-01-01T00:00:00+00:00"}
    (tmp_path / "toy.json").write_text(json.dumps(record))
    light, dark = script("plots").draw(tmp_path, tmp_path)[-2:]
    assert (light.name, dark.name) == ("gpu-light.svg", "gpu-dark.svg")
    assert light.read_text() != dark.read_text()
    found = texts(light)
    assert "GPU: klcore takes 1.2 to 2.0 times a copy" in found  # 1/0.8, 1/0.5
    assert {"torch eager", "logits", "value and gradient, float32"} <= found
    assert not {"JAX jit", "Absentee"} & found  # wrong; absent


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_what_is_exact(script):
    accuracy = script("accuracy")
    x, y = np.array([[3.0, 1.5, 1.5]]), np.array([[1.75, 1.75, 3.5]])  # 3 and 7 times distributions
    found = accuracy.exact("probs", x, y)
    np.testing.assert_allclose(found["divergence"], 0.25 * np.log(2), rtol=1e-15)
    np.testing.assert_allclose(found["x log(x/y) - x + y"], oracle.exact("kl_div", x, y).value, rtol=1e-15)
    np.testing.assert_allclose(found["x log(x/y)"], oracle.exact("rel_entr", x, y).value, rtol=1e-15)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 7))
    y = x + 10.0 ** -np.arange(5)[:, None] * rng.normal(size=x.shape)
    true = oracle.exact("kl_div", x, y, "logits")
    for space in ("logits", "log_probs"):
        found = accuracy.exact(space, x, y)
        np.testing.assert_allclose(found["divergence"], true.value, rtol=1e-15)
        np.testing.assert_allclose(found["dy"], true.dy, rtol=1e-14)
    high, low = accuracy.exact_elementary("exp", np.array([1.0]))
    assert high[0] == np.e  # 2.718281828459045 235360287471352662...
    np.testing.assert_allclose(low[0], 1.4456468917292502e-16, rtol=1e-13)


@pytest.mark.parametrize("space", ["probs", "logits"])
def test_the_measurement_sees_what_errs(script, space):
    accuracy = script("accuracy")
    with np.errstate(all="ignore"):
        found = accuracy.divergences(space, "float32", fewer=20)
    assert set(found["values"]) == set(accuracy.VALUES)
    close = accuracy.DECADES.index(-10)
    assert min(found["pairs"][close - 2 : close + 3]) > 0
    worst = {name: found["values"][name]["worst"][close] for name in found["values"]}
    assert worst["klcore"] < 1e-3
    assert worst["NumPy"] > 1
    assert sum(found["values"]["NumPy"]["negative"]) > 0
    if space == "logits":
        assert found["gradients"]["klcore"]["worst"][close] < 2e-5 < found["gradients"]["NumPy"]["worst"][close]


def test_what_is_returned_for_close_rows(script):
    accuracy = script("accuracy")
    found = accuracy.close()
    assert found["exact"] == sorted(found["exact"])
    assert len(found["exact"]) > 80
    np.testing.assert_allclose(found["returned"]["klcore"], found["exact"], rtol=4e-6)
    assert min(found["returned"]["NumPy"]) < 0
    assert min(found["returned"]["PyTorch"]) < 0


def test_the_units_of_elementary_functions(script, monkeypatch):
    accuracy = script("accuracy")
    found = accuracy.elementary_contenders("log")
    found["off by three"] = lambda x: np.nextafter(np.nextafter(np.nextafter(np.log(x), 9), 9), 9)
    monkeypatch.setattr(accuracy, "elementary_contenders", lambda function: found)
    for dtype in ("float32", "float64"):
        errors = accuracy.elementary("log", dtype, 20)
        assert max(errors["klcore"]) <= 1
        assert 2 < errors["off by three"][0] < 7  # 1 of NumPy's own; twice below a power of two
