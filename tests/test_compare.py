"""`klcore compare`: its figures against NumPy's, llama.cpp's figures against loops; its files, output and errors.

The oracle for figures is the textbook formula in float64; the tests never use the code under test to know what to
expect.
"""

import importlib
import io
import json
import math
import os
import re
import select
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import oracle
import pytest
from conftest import as_here

import klcore
from klcore.__main__ import main
from klcore.compare import files, outputs
from klcore.compare.comparison import Comparison
from klcore.compare.page import as_page

RELATIVE = oracle.TOLERANCES["kl", "float32"] + oracle.TOLERANCES["rounding", "float32"]
ABSOLUTE = oracle.TOLERANCES["textbook", "float64"]
ROWS, VOCAB, TEXT = 60, 37, 10


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture(scope="module")
def pair():
    """Float32 logits of a base and a quant that agree more in some rows than in others; and tokens."""
    rng = np.random.default_rng(0)
    x = (2 * rng.normal(size=(ROWS, VOCAB))).astype(np.float32)
    x[np.arange(ROWS), rng.integers(0, VOCAB, ROWS)] += np.linspace(0, 12, ROWS, dtype=np.float32)
    y = x + np.geomspace(0.01, 1, ROWS, dtype=np.float32)[:, None] * rng.normal(size=x.shape).astype(np.float32)
    return x, y, rng.integers(0, VOCAB, ROWS)


@pytest.fixture
def folder(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, a in zip(("base", "quant", "tokens"), pair, strict=True):
        np.save(f"{name}.npy", a)
    return tmp_path


def compare(capsys, *arguments):
    """Exit status, what was printed, and what was written to stderr."""
    capsys.readouterr()
    try:
        status = main(["compare", *map(str, arguments)])
    except SystemExit as error:  # from argparse
        status = error.code
    out, err = capsys.readouterr()
    return status, out, err


def report_of(capsys, *arguments):
    status, out, err = compare(capsys, *arguments, "--json", "-")
    assert (status, err) == (0, "")
    return json.loads(out)


def kl_of(report):
    return report["kl"]["mean"]


# ---- figures ---------------------------------------------------------------------------------------------------------


def expected_rows(x, y, tokens, temperature=1.0):
    """The textbook's figures, row by row."""
    p, q = (softmax(a.astype(np.float64) / temperature) for a in (x, y))
    m, row, top = (p + q) / 2, np.arange(len(p)), p.argmax(1)

    def kl(a, b):
        return np.where(a > 0, a * (np.log(np.where(a > 0, a, 1)) - np.log(b)), 0).sum(1)

    return {
        "kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "js": (kl(p, m) + kl(q, m)) / 2,
        "tv": np.abs(p - q).sum(1) / 2,
        "base_entropy": -(p * np.log(p)).sum(1),
        "quant_entropy": -(q * np.log(q)).sum(1),
        "same_top": (top == q.argmax(1)).astype(float),
        "base_confidence": p.max(1),
        "quant_confidence": q[row, top],
        "base_nll": -np.log(p[row, tokens]),
        "quant_nll": -np.log(q[row, tokens]),
    }


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=RELATIVE, atol=ABSOLUTE)


def assert_report(report, rows, groups=None):
    """Check that the report agrees with NumPy about these rows."""
    n = len(rows["kl"])
    for name in ("kl", "reverse_kl", "js", "tv", "base_entropy", "quant_entropy"):
        found, values = report[name], rows[name]
        close(found["mean"], values.mean())
        close(found["stderr_iid"], values.std(ddof=1) / math.sqrt(n))
        close([found["min"], found["max"]], [values.min(), values.max()])
        assert found["row_of_max"] == values.argmax()
        quantiles = np.quantile(values, [float(q) for q in found["quantiles"]])
        order = oracle.TOLERANCES["order statistic", "float32"]
        np.testing.assert_allclose(list(found["quantiles"].values()), quantiles, rtol=order + RELATIVE, atol=ABSOLUTE)
        if groups is not None:
            close(found["stderr"], clustered(values, groups))
    close(report["same_top"]["mean"], rows["same_top"].mean())
    close(report["acceptance"]["mean"], 1 - rows["tv"].mean())
    edges = [0, 0.25, 0.5, 0.75, 0.95, 1.0]
    for k, bucket in enumerate(report["confidence"]):
        inside = (rows["base_confidence"] >= edges[k]) & ((rows["base_confidence"] < edges[k + 1]) | (k == 4))
        assert bucket["rows"] == inside.sum()
        for name in ("kl", "same_top", "base_confidence", "quant_confidence"):
            if inside.any():
                close(bucket[name]["mean"], rows[name][inside].mean())
    order = np.argsort(-rows["kl"])[: len(report["worst"])]
    assert [w["row"] for w in report["worst"]] == order.tolist()
    close([w["kl"] for w in report["worst"]], rows["kl"][order])


def clustered(values, groups):
    k, n = len(np.unique(groups)), len(values)
    gaps = [(values[groups == g] - values.mean()).sum() for g in np.unique(groups)]
    return math.sqrt(k / (k - 1) * sum(g**2 for g in gaps)) / n


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("chunk", ["1", "2k", "16M"])
def test_figures_of_logits(capsys, folder, pair, chunk, temperature):
    x, y, tokens = pair
    options = ("--tokens", "tokens.npy", "--groups", TEXT, "--chunk-bytes", chunk, "--temperature", temperature)
    report = report_of(capsys, "base.npy", "quant.npy", *options)
    rows = expected_rows(x, y, tokens, temperature)
    assert_report(report, rows, np.arange(ROWS) // TEXT)
    assert report["texts"] == ROWS // TEXT
    assert [(w["text"], w["position"]) for w in report["worst"]] == [divmod(w["row"], TEXT) for w in report["worst"]]
    found = report["tokens"]
    for name in ("base", "quant"):
        close(found[f"{name}_perplexity"]["mean"], np.exp(rows[f"{name}_nll"].mean()))
    ratio = rows["quant_nll"] - rows["base_nll"]
    np.testing.assert_allclose(found["log_ratio"]["mean"], ratio.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["ratio"]["mean"], np.exp(ratio.mean()), rtol=1e-5)
    np.testing.assert_allclose(found["log_ratio"]["stderr"], clustered(ratio, np.arange(ROWS) // TEXT), rtol=1e-5)
    gap = np.exp(-rows["quant_nll"]) - np.exp(-rows["base_nll"])
    np.testing.assert_allclose(found["delta_p"]["rms"], np.sqrt((gap**2).mean()), rtol=1e-5)
    np.testing.assert_allclose(found["delta_p"]["quantiles"]["0.5"], np.median(gap), rtol=1e-3)


@pytest.mark.parametrize("spaces", ["probs", "log_probs", "probs,logits", "logits,log_probs"])
def test_figures_of_other_spaces(capsys, folder, pair, spaces):
    x, y = (a.astype(np.float64) for a in pair[:2])
    into = {"logits": lambda z: z, "probs": softmax, "log_probs": lambda z: np.log(softmax(z))}
    of = spaces.split(",")
    np.save("a.npy", into[of[0]](x))
    np.save("b.npy", into[of[-1]](y))
    report = report_of(capsys, "a.npy", "b.npy", "--space", spaces, "--tokens", "tokens.npy")
    assert report["space"] == [of[0], of[-1]]
    assert_report(report, expected_rows(*pair))
    assert "pass --groups" in report["notes"][0]


def test_against_itself(capsys, folder):
    report = report_of(capsys, "base.npy", "base.npy", "--tokens", "tokens.npy")
    for name in ("kl", "reverse_kl", "js", "tv"):
        values = report[name]
        assert {values["mean"], values["min"], values["max"], values["stderr"], *values["quantiles"].values()} == {0}
    assert report["same_top"]["mean"] == report["acceptance"]["mean"] == report["tokens"]["ratio"]["mean"] == 1


def test_the_bits_of_any_split(capsys, folder):
    reports = []
    for options in (("--chunk-bytes", 1), ("--chunk-bytes", "5k", "--threads", 1), ("--threads", 2)):
        report = report_of(
            capsys, "base.npy", "quant.npy", "--tokens", "tokens.npy", "--groups", 7, "--partial", *options
        )
        reports.append({k: v for k, v in report.items() if k != "command"})
    assert reports[0] == reports[1] == reports[2]


def test_masked_and_infinite_rows(capsys, folder, pair):
    x, y, tokens = (a.copy() for a in pair)
    mask = np.arange(ROWS) % 3 > 0
    x[0] = np.nan  # masked
    y[1, x[1].argmax()] = -np.inf  # KL is infinite
    tokens[4:20] = -100
    np.save("base.npy", x), np.save("quant.npy", y), np.save("tokens.npy", tokens), np.save("mask.npy", mask)
    report = report_of(capsys, "base.npy", "quant.npy", "--mask", "mask.npy", "--tokens", "tokens.npy", "--worst", 2)
    rows = expected_rows(x[mask][1:], y[mask][1:], pair[2][mask][1:])
    close(kl_of(report), rows["kl"].mean())
    assert (report["rows_infinite"], report["rows_nan"], report["rows_counted"]) == (1, 0, mask.sum() - 1)
    assert report["worst"][0] == {"row": 1, "kl": None}
    assert report["notes"][0].startswith("1 row has an infinite KL")
    known = mask & (tokens >= 0)
    nll = expected_rows(x[known], x[known], tokens[known])["base_nll"]
    close(report["tokens"]["base_perplexity"]["mean"], np.exp(nll.mean()))
    status, _, err = compare(capsys, "base.npy", "quant.npy", "--mask", "mask.npy", "--max-mean", 100)
    assert status == 1
    assert "infinite" in err


def test_rows_that_are_no_distributions(folder, capsys):
    """Rows below 1 that do not add up to 1 are compared, with a note."""
    rng = np.random.default_rng(0)
    for name in ("base", "quant"):
        np.save(folder / f"{name}.npy", rng.uniform(0, 1, (20, 40)).astype("float32"))
    _, out, _ = compare(capsys, folder / "base.npy", folder / "quant.npy", "--space", "probs", "--json", "-")
    assert any("total variation is above 1" in note for note in json.loads(out)["notes"])


def test_a_token_that_quant_excludes(capsys, folder, pair):
    y, tokens = pair[1].copy(), pair[2]
    y[3, tokens[3]] = -np.inf
    np.save("quant.npy", y)
    report = report_of(capsys, "base.npy", "quant.npy", "--tokens", "tokens.npy")
    assert report["tokens"]["quant_perplexity"]["mean"] is None
    assert report["tokens"]["infinite"] == 1
    assert any(note.startswith("1 loss is infinite") for note in report["notes"])


def test_rows_of_nan(capsys, folder, pair):
    x = pair[0].copy()
    x[7, 3] = x[9, 0] = np.nan
    np.save("base.npy", x)
    status, out, err = compare(capsys, "base.npy", "quant.npy")
    assert status == 2
    assert err.count("\n") == 1
    assert "2 rows are NaN, starting with row 7" in err
    assert "58 of 37 classes" in out
    assert compare(capsys, "base.npy", "quant.npy", "--skip-nan")[0] == 0


def test_divergences_beyond_float32(capsys, folder, pair):
    """Of float64 logits; infinite in every figure, without a NumPy warning."""
    np.save("base.npy", pair[0].astype(np.float64)), np.save("quant.npy", pair[1].astype(np.float64) * 1e300)
    report = report_of(capsys, "base.npy", "quant.npy", "--rows", "rows.npy")
    assert report["rows_infinite"] == ROWS
    assert report["worst"][0]["kl"] is None
    assert np.isposinf(np.load("rows.npy")).all()


def test_a_probability_a_little_above_one(capsys, folder):
    """Its logarithm is rounded; its entropy is then a little below 0, and still a figure."""
    z = np.full((3, 2), -200, np.float32)
    z[:, 0] = 1e-6
    np.save("base.npy", z)
    report = report_of(capsys, "base.npy", "base.npy", "--space", "log_probs")
    assert report["base_entropy"]["max"] == 0
    z[1] = 9
    np.save("base.npy", z), np.save("mask.npy", [True, False, True])
    assert report_of(capsys, "base.npy", "base.npy", "--space", "log_probs", "--mask", "mask.npy")["rows_counted"] == 2


def test_quick(capsys, folder, pair):
    report = report_of(capsys, "base.npy", "quant.npy", "--quick")
    close(kl_of(report), expected_rows(*pair)["kl"].mean())
    assert report["same_top"]["mean"] > 0.5
    assert not {"js", "acceptance", "base_entropy"} & report.keys()


def test_vocab_cuts_padding(capsys, folder, pair):
    x, y, tokens = pair
    np.save("padded.npy", np.pad(y, ((0, 0), (0, 3)), constant_values=50))
    report = report_of(capsys, "base.npy", "padded.npy", "--vocab", VOCAB)
    close(kl_of(report), expected_rows(x, y, tokens)["kl"].mean())


# ---- files -----------------------------------------------------------------------------------------------------------


def save_npz(path, a):
    np.savez(path, logits=a, other=a[:1])


def save_packed(path, a):
    np.savez_compressed(path, logits=a)


def save_raw(path, a):
    a.tofile(path)


def save_safetensors(path, a):
    pytest.importorskip("safetensors.numpy").save_file({"logits": a, "other": a[:1].copy()}, path)


def save_cube(path, a):
    pytest.importorskip("safetensors.numpy").save_file({"logits": a.reshape(ROWS // TEXT, TEXT, VOCAB)}, path)


def save_folder(path, a):
    path.mkdir()
    save = pytest.importorskip("safetensors.numpy").save_file
    for k, part in enumerate(np.split(a, [17, 40])):
        save({"logits": part[None]}, path / f"row_{k:06d}.safetensors")


def save_swapped(path, a):
    np.save(path, a.astype(a.dtype.newbyteorder(">")))


FILES = {
    "f.npy": np.save,
    "cube.npy": lambda path, a: np.save(path, a.reshape(ROWS // TEXT, TEXT, VOCAB)),
    "swapped.npy": save_swapped,
    "f.npz:logits": save_npz,
    "packed.npz": save_packed,
    "f.safetensors:logits": save_safetensors,
    "cube.safetensors": save_cube,
    "folder": save_folder,
    "f.bin": save_raw,
}


DTYPES = ("float64", "float32", "float16", "bfloat16")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in FILES for d in DTYPES if (n, d) != ("swapped.npy", "bfloat16")],  # NumPy does not know its bytes
)
def test_what_a_file_holds(capsys, folder, pair, name, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    y = pair[1].astype(dtype)
    FILES[name](folder / name.partition(":")[0], y)
    options = ["--dtype", y.dtype.name] if name == "f.bin" or y.dtype.name == "bfloat16" else []
    options += ["--shape", f"{ROWS},{VOCAB}"] if name == "f.bin" else []
    report = report_of(capsys, "base.npy", name, *options, "--rows", "rows.npy", "--chunk-bytes", "1k")
    expected = expected_rows(pair[0], y.astype(np.float64), pair[2])["kl"]
    close(kl_of(report), expected.mean())
    close(np.load("rows.npy"), expected)


def test_a_chunk_of_safetensors_is_read_alone(capsys, folder, pair, monkeypatch):
    """Only the chunk, not the whole array or file, which the package would read for each chunk."""
    save = pytest.importorskip("safetensors.numpy").save_file
    save({"logits": pair[1][None]}, "one.safetensors")
    read, plain = [], files.read_into

    def counting(path, offset, array):
        read.append(array.nbytes)
        plain(path, offset, array)

    monkeypatch.setattr(files, "read_into", counting)
    report_of(capsys, "one.safetensors", "one.safetensors", "--chunk-bytes", "1k")
    assert len(read) == 2 * ROWS // 3
    assert sum(read) == 2 * pair[1].nbytes


def test_cut_off_files(capsys, folder, pair):
    whole = (folder / "quant.npy").read_bytes()
    (folder / "quant.npy").write_bytes(whole[: -3 * 4 * VOCAB - 1])
    status, _, err = compare(capsys, "base.npy", "quant.npy")
    assert status == 2
    assert f"quant.npy is truncated after row {ROWS - 5}: only {ROWS - 4} of {ROWS} rows are complete" in err
    report = report_of(capsys, "base.npy", "quant.npy", "--partial")
    assert report["rows"] == ROWS - 4
    close(kl_of(report), expected_rows(*pair)["kl"][:-4].mean())


# ---- llama.cpp -------------------------------------------------------------------------------------------------------


def llama_bytes(logits, tokens, floor=16, second=False):
    """A file, written row by row from the description of the format."""
    n_chunk, n_ctx = tokens.shape
    vocab = logits.shape[1]
    out = io.BytesIO()
    out.write(b"_logits2" if second else b"_logits_")
    out.write(struct.pack("<3i", n_ctx, vocab, n_chunk) + tokens.astype("<i4").tobytes())
    for z in logits.astype(np.float64):
        top = z.max()
        low = z.min() if second else max(z.min(), top - floor)
        steps = 65534 if second else 65535
        scale = (top - low) / steps
        log_total = math.log(np.exp(z - top).sum())
        code = np.maximum(np.rint((z - low) / scale), 0).astype(int) + second
        out.write(struct.pack("<2f", scale, low - top - log_total))
        out.write(code.astype("<u2").tobytes() + b"\0\0" * (vocab % 2))
    return out.getvalue()


CHUNKS, CONTEXT = 6, 20  # in tokens; 9 rows per chunk


@pytest.fixture(params=[(16, 37), (24, 36), (16, 1001)], ids=str)
def base_file(request, folder):
    """Odd and even vocabularies, and both floors; logits far below these."""
    floor, vocab = request.param
    rng = np.random.default_rng(1)
    n = CHUNKS * (CONTEXT - 1 - CONTEXT // 2)
    z = (6 * rng.normal(size=(n, vocab))).astype(np.float32)
    tokens = rng.integers(0, vocab, (CHUNKS, CONTEXT))
    (folder / "base.kld").write_bytes(llama_bytes(z, tokens, floor))
    y = z + (0.1 * rng.normal(size=z.shape)).astype(np.float32)
    np.save("y.npy", y)
    return z, y, tokens[:, CONTEXT // 2 + 1 :].reshape(-1), floor


def test_llama_files(capsys, folder, base_file):
    z, y, targets, floor = base_file
    report = report_of(capsys, "base.kld", "y.npy")
    assert report["texts"] == CHUNKS
    assert "lower bounds" in report["notes"][0]
    p, q = (softmax(a.astype(np.float64)) for a in (z, y))
    stored = z > z.max(1, keepdims=True) - np.float32(floor)
    exact = np.where(stored, p * np.log(p / q) - p + q, 0).sum(1)
    # codes are steps of floor/65535, so a log-probability is off by half of one: to first order of the root of the KL
    step = floor / 65535
    assert abs(kl_of(report) - exact.mean()) <= step * np.sqrt(2 * exact).mean() + step**2
    rows = expected_rows(z, y, targets)
    close(report["tokens"]["quant_perplexity"]["mean"], np.exp(rows["quant_nll"].mean()))
    above = np.minimum(rows["base_nll"], -np.log(p.max(1)) + floor)  # numbers below the floor are read as the floor
    assert abs(math.log(report["tokens"]["base_perplexity"]["mean"]) - above.mean()) <= step + RELATIVE * above.mean()


def test_a_llama_file_of_spoilt_numbers(capsys, folder, base_file):
    """Numbers beyond float32 or float64, without a warning from NumPy or Python."""
    np.save("y.npy", 1e4 * base_file[1])
    status, out, err = compare(capsys, "base.kld", "y.npy", "--llama")
    assert (status, err) == (0, "")
    assert "Mean PPL(Q)                   :        inf" in out
    assert re.search(r"perplexity of quant +- ± -\ntheir ratio, paired +- ± -\n", out)
    data = bytearray((folder / "base.kld").read_bytes())
    start = 20 + 4 * CHUNKS * CONTEXT
    data[start : start + 4] = struct.pack("<f", 3e38)
    (folder / "base.kld").write_bytes(data)
    refused(capsys, "row 0 of base.kld has a probability above 1; the file is corrupt", "base.kld", "y.npy")


def test_llama_file_beside_itself(capsys, folder, base_file):
    """The tool prints negative values here."""
    np.save("z.npy", base_file[0])
    report = report_of(capsys, "base.kld", "z.npy")
    for name in ("kl", "reverse_kl", "js", "tv"):
        assert report[name]["min"] >= 0
    assert report["kl"]["max"] < (base_file[3] / 65535) ** 2
    report = report_of(capsys, "base.kld", "base.kld")
    assert report["kl"]["max"] < 1e-12
    assert "quant is stored with a floor, too" in report["notes"][1]
    refused(capsys, "base.kld is stored with a floor, so BASE must be", "z.npy", "base.kld")


def test_second_format(capsys, folder, base_file):
    z, y, targets, _ = base_file
    tokens = np.zeros((CHUNKS, CONTEXT), int)
    tokens[:, CONTEXT // 2 + 1 :] = targets.reshape(CHUNKS, -1)
    (folder / "base2.kld").write_bytes(llama_bytes(z, tokens, second=True))
    report = report_of(capsys, "base2.kld", "y.npy")
    exact = expected_rows(z, y, targets)
    step = (z.max() - z.min()) / 65534
    assert abs(kl_of(report) - exact["kl"].mean()) <= step * np.sqrt(2 * exact["kl"]).mean() + step**2
    assert abs(math.log(report["tokens"]["base_perplexity"]["mean"]) - exact["base_nll"].mean()) <= step
    assert not any("lower bounds" in note for note in report["notes"])
    assert report_of(capsys, "y.npy", "base2.kld", "--tokens", save(targets))["space"] == ["logits", "log_probs"]


def save(a):
    np.save("saved.npy", a)
    return "saved.npy"


def tool_row(stored, vocab, logits, target):
    """llama.cpp's figures of one row, class by class, from the bytes as stored."""
    f = np.float32
    scale, least = struct.unpack("<2f", stored[:8])
    codes = struct.unpack(f"<{vocab}H", stored[8 : 8 + 2 * vocab])
    top = max(f(v) for v in logits)
    total = sum(float(np.exp(f(v) - top)) for v in logits)
    log_total = f(math.log(total))
    kld, best = 0.0, (-math.inf, 0)
    for k, (code, logit) in enumerate(zip(codes, logits, strict=True)):
        log_p = f(f(scale) * f(code) + f(least))
        best = max(best, (float(log_p), -k))
        if log_p > -16:
            kld += float(f(np.exp(log_p)) * f(log_p - f(logit) + top + log_total))
    nll = f(top + log_total - f(logits[target]))
    nll_base = -f(f(scale) * f(codes[target]) + f(least))
    return kld, float(np.exp(-nll) - np.exp(-nll_base)), nll, nll_base, int(np.argmax(logits)) == -best[1]


def test_llama_block(capsys, folder, base_file):
    z, y, targets, _ = base_file
    assert "both print" in compare(capsys, "base.kld", "y.npy", "--llama", "--json", "-")[2]
    status, out, err = compare(capsys, "base.kld", "y.npy", "--llama")
    assert (status, err) == (0, "")
    data, vocab = (folder / "base.kld").read_bytes(), z.shape[1]
    start, size = 20 + 4 * CHUNKS * CONTEXT, 2 * (2 * ((vocab + 1) // 2) + 4)
    rows = [tool_row(data[start + size * k :][:size], vocab, y[k], targets[k]) for k in range(len(y))]
    kld, p_diff, nll, nll_base, same = (np.array(c, np.float64) for c in zip(*rows, strict=True))
    n = len(kld)
    said = {
        re.sub(r"\s+", " ", label).strip(): [float(v) for v in re.findall(r"-?\d+\.\d+", rest)]
        for label, _, rest in (line.partition(":") for line in out[out.index("====") :].splitlines())
    }

    def error(v):
        return math.sqrt(((v**2).mean() - v.mean() ** 2) / (n - 1))

    cov = ((nll * nll_base).mean() - nll.mean() * nll_base.mean()) / (n - 1)
    ratio, d_ratio = (nll - nll_base).mean(), math.sqrt(error(nll) ** 2 + error(nll_base) ** 2 - 2 * cov)
    expected = {
        "Mean PPL(Q)": [np.exp(nll.mean()), np.exp(nll.mean()) * error(nll)],
        "Mean PPL(base)": [np.exp(nll_base.mean()), np.exp(nll_base.mean()) * error(nll_base)],
        "Mean ln(PPL(Q)/PPL(base))": [ratio, d_ratio],
        "Mean PPL(Q)/PPL(base)": [np.exp(ratio), np.exp(ratio) * d_ratio],
        "Cor(ln(PPL(Q)), ln(PPL(base)))": [100 * cov / error(nll) / error(nll_base)],
        "Mean KLD": [kld.mean(), error(kld)],
        "Maximum KLD": [kld.max()],
        "Median KLD": [np.median(kld)],
        "Minimum KLD": [kld.min()],
        "99.9% KLD": [np.quantile(kld, 0.999)],
        "0.1% KLD": [np.quantile(kld, 0.001)],
        "Mean Δp": [100 * p_diff.mean(), 100 * error(p_diff)],
        "75.0% Δp": [100 * np.quantile(p_diff, 0.75)],
        "RMS Δp": [100 * np.sqrt((p_diff**2).mean()), 50 * error(p_diff**2) / np.sqrt((p_diff**2).mean())],
        "Same top p": [100 * same.mean(), 100 * math.sqrt(same.mean() * (1 - same.mean()) / (n - 1))],
    }
    for label, numbers in expected.items():
        # as printed: six digits or three; and float32, whose sums and exponentials are off by a few eps
        digits = 0.51e-6 if "KLD" in label or label.startswith("Mean PPL") or "ln(" in label else 0.51e-3
        digits = 0.51e-2 if label.startswith("Cor") else digits
        np.testing.assert_allclose(
            said[label], numbers, rtol=oracle.TOLERANCES["golden", "float32"], atol=digits + 1e-6, err_msg=label
        )
    shape = [re.sub(r"\s*-?\d+\.\d+", "N", line) for line in out[out.index("====") :].splitlines()]
    assert shape == LAYOUT


LAYOUT = """\
====== Perplexity statistics ======
Mean PPL(Q)                   :N ±N
Mean PPL(base)                :N ±N
Cor(ln(PPL(Q)), ln(PPL(base))):N%
Mean ln(PPL(Q)/PPL(base))     :N ±N
Mean PPL(Q)/PPL(base)         :N ±N
Mean PPL(Q)-PPL(base)         :N ±N

====== KL divergence statistics ======
Mean    KLD:N ±N
Maximum KLD:N
N%   KLD:N
N%   KLD:N
N%   KLD:N
N%   KLD:N
Median  KLD:N
N%   KLD:N
N%   KLD:N
N%   KLD:N
N%   KLD:N
Minimum KLD:N

====== Token probability statistics ======
Mean    Δp:N ±N %
Maximum Δp:N%
N%   Δp:N%
N%   Δp:N%
N%   Δp:N%
N%   Δp:N%
N%   Δp:N%
Median  Δp:N%
N%   Δp:N%
N%   Δp:N%
N%   Δp:N%
N%   Δp:N%
N%   Δp:N%
Minimum Δp:N%
RMS Δp    :N ±N %
Same top p:N ±N %""".splitlines()


# ---- what is written -------------------------------------------------------------------------------------------------


def test_the_table(capsys, folder):
    """80 columns, no colours, and the figures of the JSON."""
    status, out, err = compare(capsys, "base.npy", "quant.npy", "--tokens", "tokens.npy", "--groups", TEXT)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out
    assert "nan" not in out
    report = report_of(capsys, "base.npy", "quant.npy", "--tokens", "tokens.npy", "--groups", TEXT)
    for name in ("kl", "js", "tv"):
        assert f"{report[name]['mean']:.4g} ± {report[name]['stderr']:.4g}" in out
    assert f"{100 * report['same_top']['mean']:.2f} %" in out
    assert f"{report['tokens']['ratio']['mean']:.4g} ± {report['tokens']['ratio']['stderr']:.4g}" in out
    assert all(f"{w['row']}" in out for w in report["worst"])


def test_the_files(capsys, folder, pair):
    pytest.importorskip("matplotlib")
    written = ("--json", "r.json", "--rows", "rows.npy", "--plot", "p.png", "--html", "r.html")
    status, _, err = compare(capsys, "base.npy", "quant.npy", "--groups", TEXT, *written)
    assert (status, err) == (0, "")
    assert json.loads((folder / "r.json").read_text()) == report_of(
        capsys, "base.npy", "quant.npy", "--groups", TEXT
    ) | {"command": f"klcore compare base.npy quant.npy --groups {TEXT} {' '.join(written)}"}
    rows = np.load("rows.npy")
    assert rows.dtype == np.float32
    close(rows, expected_rows(*pair)["kl"])
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "r.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 4  # light and dark, wide and narrow
    assert re.findall(r"(?:src|srcset|href)=['\"](?!data:)", page) == []  # nothing is loaded from elsewhere
    assert "prefers-color-scheme: dark" in page
    assert "klcore compare base.npy quant.npy" in page
    assert sorted(p.name for p in folder.iterdir()) == [
        "base.npy", "p.png", "quant.npy", "r.html", "r.json", "rows.npy", "tokens.npy"
    ]  # fmt: skip


@pytest.mark.parametrize(("what", "suffix"), [("alike", ".png"), ("one row", ".svg"), ("excluded", ".pdf")])
def test_pictures_of_odd_comparisons(capsys, folder, pair, what, suffix):
    pytest.importorskip("matplotlib")
    x, y = pair[0], pair[1].copy()
    if what == "alike":
        y = x
    elif what == "one row":
        x, y = x[:1], y[:1]
    else:
        y[:, 3] = -np.inf
    np.save("base.npy", x), np.save("quant.npy", y)
    status, _, err = compare(capsys, "base.npy", "quant.npy", "--plot", f"p{suffix}")
    assert (status, err) == (0, "")
    first = (folder / f"p{suffix}").read_bytes()
    compare(capsys, "base.npy", "quant.npy", "--plot", f"p{suffix}", "--force")
    assert (folder / f"p{suffix}").read_bytes() == first


def test_nothing_is_left_behind_in_python(capsys, folder):
    """The command may be called from a program, or a notebook, with its own threads and figures."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.figure()
    before = klcore.get_num_threads(), pyplot.get_fignums(), pyplot.get_backend()
    assert compare(capsys, "base.npy", "quant.npy", "--threads", "7", "--plot", "p.png")[0] == 0
    assert (klcore.get_num_threads(), pyplot.get_fignums(), pyplot.get_backend()) == before
    pyplot.close()


def test_a_name_is_no_html(capsys, folder):
    (folder / "base.npy").rename(folder / "<b>&.npy")
    page = as_page(report_of(capsys, "<b>&.npy", "quant.npy"), dict.fromkeys(PICTURES, b""))
    assert "&lt;b&gt;&amp;.npy" in page
    assert "<b>&" not in page
    assert "<li>errors assume independent rows" in page


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_a_name_that_is_no_text(capsys, folder):
    pytest.importorskip("matplotlib")
    name = os.fsdecode(b"\xff.npy")
    (folder / "quant.npy").rename(name)
    status, out, err = compare(capsys, "base.npy", name, "--json", "r.json", "--html", "r.html")
    assert (status, err) == (0, "")
    assert "quant  ?.npy" in out
    assert json.loads((folder / "r.json").read_text())["quant"] == name
    assert "?.npy compared with base.npy" in (folder / "r.html").read_text()


def test_a_terminal_of_ascii(folder):
    here = as_here()
    here["env"] = {**here["env"], "PYTHONIOENCODING": "ascii"}
    paths = [str(folder / name) for name in ("base.npy", "quant.npy")]
    for options in ([], ["--json", "-"]):
        command = [sys.executable, "-m", "klcore", "compare", *paths, *options]
        done = subprocess.run(command, capture_output=True, timeout=60, **here)
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.isascii()


PICTURES = [(theme, narrow) for theme in ("light", "dark") for narrow in (False, True)]


@pytest.mark.parametrize(
    ("limits", "status", "words"),
    [
        (("--max-mean", "10", "--max-q99", "100"), 0, ""),
        (("--max-mean", "1e-9"), 1, "the mean KL is .* above --max-mean 1e-09"),
        (("--max-mean", "10", "--max-q99", "1e-9"), 1, "the 99 % quantile of the KL is .* above --max-q99 1e-09"),
        (("--max-mean", "nan"), 1, "above --max-mean nan"),
    ],
)
def test_limits(capsys, folder, limits, status, words):
    found, out, err = compare(capsys, "base.npy", "quant.npy", *limits)
    assert found == status
    assert re.search(words, err)
    assert err.count("\n") == status
    assert "KL(base || quant)" in out


# ---- interrupted and resumed -----------------------------------------------------------------------------------------


def test_interrupted_and_resumed(capsys, folder, monkeypatch):
    """Ctrl-C after some chunks: the figures so far, status 130; then the rest, and the report of a complete run."""
    options = ("--tokens", "tokens.npy", "--groups", TEXT, "--worst", 3)
    whole = report_of(capsys, "base.npy", "quant.npy", *options, "--rows", "whole.npy")
    plain, calls = Comparison._add, []

    def until(self, *arguments):
        plain(self, *arguments)
        calls.append(arguments)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)

    resumed = (*options, "--chunk-bytes", 1500, "--resume", "state", "--rows", "rows.npy", "--force")
    with monkeypatch.context() as patch:
        patch.setattr(Comparison, "_add", until)
        status, out, _ = compare(capsys, "base.npy", "quant.npy", *resumed)
    done = calls[-1][2]
    assert status == 130
    assert 0 < done < ROWS
    assert f"stopped after {done} of {ROWS} rows" in out
    np.testing.assert_array_equal(np.load("rows.npy"), np.load("whole.npy")[:done])
    again = report_of(capsys, "base.npy", "quant.npy", *resumed)
    assert {k: v for k, v in again.items() if k != "command"} == {k: v for k, v in whole.items() if k != "command"}
    np.testing.assert_array_equal(np.load("rows.npy"), np.load("whole.npy"))
    with monkeypatch.context() as patch:  # complete chunks are not computed again
        patch.delattr(Comparison, "figures")
        assert report_of(capsys, "base.npy", "quant.npy", *resumed) == again


def test_ctrl_c_of_a_process(folder, pair):
    """From outside, sent to the command itself."""
    x = np.broadcast_to(pair[0][:1], (200_000, VOCAB))
    np.save("large.npy", x)
    code = 'import sys; from klcore.__main__ import main; print("ready", flush=True); sys.exit(main())'
    arguments = ["compare", str(folder / "large.npy"), str(folder / "large.npy"), "--chunk-bytes", "1k"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **as_here()
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(1.5)  # somewhere in the middle: the chunk does not matter
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "stopped after" in out


def test_a_state_that_cannot_be_written(capsys, folder, monkeypatch):
    def fail(*arguments):
        raise outputs.InputError("no room")

    monkeypatch.setattr(outputs, "write_state", fail)
    status, out, err = compare(capsys, "base.npy", "quant.npy", "--resume", "state")
    assert (status, err) == (2, "klcore compare: no room\n")
    assert "KL(base || quant)" in out


def test_ctrl_c_outside_the_loop(capsys, folder, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupt)
    assert compare(capsys, "base.npy", "quant.npy") == (130, "", "")


def test_states_of_other_comparisons(capsys, folder):
    assert compare(capsys, "base.npy", "quant.npy", "--resume", "state")[0] == 0
    status, _, err = compare(capsys, "base.npy", "quant.npy", "--resume", "state", "--quick")
    assert status == 2
    assert "its --quick is False, but here it is True" in err
    np.save("quant.npy", np.load("base.npy"))
    status, _, err = compare(capsys, "base.npy", "quant.npy", "--resume", "state")
    assert status == 2
    assert re.search(r"state is from another comparison: its quant.npy is 9,.* bytes of 20.*, but here", err)
    spoilt = bytearray((folder / "state").read_bytes())
    spoilt[60:80] = bytes([255] * 20)
    for content in (b"PK\x03\x04", spoilt):
        (folder / "state").write_bytes(content)
        assert "not a state of klcore compare" in compare(capsys, "base.npy", "quant.npy", "--resume", "state")[2]


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (("two.npz:a",), ("two.npz:b",), "its quant is .*two.npz:a"),
        (("quant.npy", "--mask", "m.npy"), ("quant.npy", "--mask", "m.npy"), "its m.npy is"),
        (("raw", "--dtype", "float16"), ("raw", "--dtype", "bfloat16"), "its quant is .*'float16'"),
    ],
)
def test_states_of_other_numbers(capsys, folder, pair, first, then, words):
    """Another array of the same file, another mask of the same name, other numbers of the same bytes."""
    pytest.importorskip("ml_dtypes")
    np.savez("two.npz", a=pair[0], b=pair[1])
    pair[1].astype(np.float16).tofile("raw")
    options = ("--shape", f"{ROWS},{VOCAB}", "--resume", "state")
    np.save("m.npy", np.arange(ROWS) > 5)
    assert compare(capsys, "base.npy", *first, *options)[0] == 0
    np.save("m.npy", np.arange(ROWS) > 6)
    os.utime("m.npy", ns=(1, 1))  # file system clocks are coarse
    status, out, err = compare(capsys, "base.npy", *then, *options)
    assert (status, out) == (2, "")
    assert re.search(words, err)


# ---- bad input -------------------------------------------------------------------------------------------------------


def npy(a):
    out = io.BytesIO()
    np.save(out, a)
    return out.getvalue()


def torch_file():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    return out.getvalue()


class Unpickled:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def npy_of_objects():
    out = io.BytesIO()
    np.save(out, np.array([[Unpickled()]], object), allow_pickle=True)
    return out.getvalue()


HEADER = b"_logits_" + struct.pack("<3i", 20, 37, 6)
BAD_FILES = {
    "empty": (b"", "bad is empty"),
    "stub": (HEADER[:12], "bad ends in its header; the run that wrote it stopped"),
    "no tokens": (HEADER + b"\0" * 9, "bad ends in its 6 x 20 tokens"),
    "no sense": (b"_logits_" + struct.pack("<3i", 0, 5, 1), "invalid header: n_ctx 0"),
    "first row": (HEADER + b"\0" * 500, "bad is truncated in its first row"),
    "rows": (HEADER + b"\0" * (480 + 84 * 10 + 5), "bad is truncated after row 9: only 10 of 54 rows"),
    "pickle": (b"\x80\x04\x95.", "bad is a pickle, which can run any code"),
    "torch": (torch_file(), "bad was written by torch.save"),
    "objects": (npy_of_objects(), "bad holds Python objects"),
    "header": (npy(np.zeros((2, 2)))[:30], "has no valid header"),
    "open header": (npy(np.zeros((2, 2))).replace(b"2), }", b"2    "), "has no valid header"),
    "negative": (npy(np.zeros((2, 2))).replace(b"(2, 2)", b"(-2,2)"), "which is empty"),
    "zip": (b"PK\x03\x04 and no more", r"bad cannot be read as .npz"),
    "safetensors": (struct.pack("<Q", 90) + b'{"logits":' + b" " * 100, "bad is not a complete .safetensors file"),
    "text": (b"0.5 0.25\n", r"--shape ROWS,VOCAB and --dtype"),
    "integers": (npy(np.zeros((ROWS, VOCAB), int)), "bad has dtype int64, but logits must be float64"),
    "complex": (npy(np.zeros((ROWS, VOCAB), complex)), "bad has dtype complex128"),
    "two bytes": (npy(np.zeros((ROWS, VOCAB), "V2")), "pass --dtype bfloat16"),
    "one axis": (npy(np.zeros(5)), r"bad has shape \(5,\)"),
    "nothing": (npy(np.zeros((0, 5))), r"bad has shape \(0, 5\), which is empty"),
    "columns": (npy(np.zeros((ROWS, VOCAB), order="F")), "Fortran order"),
    "fewer": (npy(np.zeros((ROWS - 1, VOCAB))), "base.npy has 60 rows, but bad has 59"),
    "classes": (npy(np.zeros((ROWS, VOCAB + 3))), "if the larger one is padded, pass --vocab 37"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(capsys, folder, name):
    content, words = BAD_FILES[name]
    (folder / "bad").write_bytes(content)
    if name == "safetensors":
        pytest.importorskip("safetensors")
    refused(capsys, words, "base.npy", "bad")


def refused(capsys, words, *arguments):
    status, out, err = compare(capsys, *arguments, "--json", "new.json")
    assert (status, out) == (2, "")
    assert err.startswith("klcore compare: ")
    assert err.count("\n") == 1
    assert re.search(words, err), err
    assert not {"new.json", "unpickled"} & set(os.listdir("."))


OTHERS = {
    "absent": (("base.npy", "absent"), "absent cannot be read: No such file"),
    "empty folder": (("base.npy", "folder"), r"folder without files row_\*"),
    "member": (("base.npy", "two.npz"), r"two.npz has 2 arrays \(a, b\); choose one"),
    "no member": (("base.npy", "two.npz:c"), "two.npz has no array 'c'; it has a, b"),
    "no members": (("base.npy", "quant.npy:c"), "quant.npy is a single array, without an array named 'c'"),
    "open tokens": (("base.npy", "quant.npy", "--tokens", "open.npy"), "for --tokens, cannot be read"),
    "mask": (("base.npy", "quant.npy", "--mask", "short.npy"), "for --mask, has 5 numbers, but there are 60 rows"),
    "mask of numbers": (("base.npy", "quant.npy", "--mask", "tokens.npy"), "it must hold booleans"),
    "nobody": (("base.npy", "quant.npy", "--mask", "none.npy"), "none.npy, for --mask, leaves out all rows"),
    "groups": (("base.npy", "quant.npy", "--groups", "short.npy"), "--groups, has dtype bool; it must hold integers"),
    "whole texts": (("base.npy", "quant.npy", "--groups", "7"), "60 rows are not a multiple of 7"),
    "no text": (("base.npy", "quant.npy", "--groups", "0"), "not a multiple of 0"),
    "tokens": (("base.npy", "quant.npy", "--tokens", "large.npy"), "the token of row 1 is 99, but there are only 37"),
    "no tokens": (("base.npy", "quant.npy", "--tokens", "two.npz"), "is not a .npy file"),
    "vocab": (("base.npy", "quant.npy", "--vocab", "38"), "--vocab 38 is more than the 37"),
    "temperature": (("base.npy", "quant.npy", "--temperature", "0"), "must be positive and finite"),
    "of logits": (("base.npy", "quant.npy", "--temperature", "2", "--space", "probs"), "divides logits"),
    "space": (("base.npy", "quant.npy", "--space", "log_probs"), "row 0 of base.npy has a probability above 1"),
    "space of one": (("base.npy", "quant.npy", "--space", "logits,log_probs"), "of quant.npy has a probability above"),
    "llama": (("base.npy", "quant.npy", "--llama"), "--llama needs a _logits_ file"),
    "raw": (("base.npy", "raw", "--shape", "2,2", "--dtype", "float32"), "raw has 100 bytes, but 2 rows of 2"),
    "raw rows": (("base.npy", "raw", "--shape", "9,3", "--dtype", "float32"), "truncated after row 7"),
    "exists": (("base.npy", "quant.npy", "--rows", "tokens.npy"), "tokens.npy exists; --force overwrites it"),
    "input": (("base.npy", "quant.npy", "--rows", "base.npy", "--force"), "base.npy is an input; write"),
    "twice": (("base.npy", "quant.npy", "--rows", "new.json"), "new.json is given for two outputs"),
    "no folder": (("base.npy", "quant.npy", "--rows", "no/r.npy"), "there is no folder no"),
    "picture": (("base.npy", "quant.npy", "--plot", "p.jpg"), "must end in .png, .svg, .pdf"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_bad_input(capsys, folder, name):
    arguments, words = OTHERS[name]
    np.save("short.npy", np.ones(5, bool)), np.save("none.npy", np.zeros(ROWS, bool))
    np.save("large.npy", np.array([0, 99] + [1] * (ROWS - 2)))
    np.savez("two.npz", a=np.zeros((2, 2)), b=np.zeros((2, 2)))
    (folder / "raw").write_bytes(bytes(100))
    (folder / "folder").mkdir()
    (folder / "open.npy").write_bytes(BAD_FILES["open header"][0])
    kept = (folder / "tokens.npy").read_bytes()
    refused(capsys, words, *arguments)
    assert (folder / "tokens.npy").read_bytes() == kept


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such things here")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("pipe",), "pipe is a pipe or a device"),  # opening it would wait forever
        (("quant.npy", "--rows", "pipe", "--force"), "pipe is a pipe or a device; write to a file"),
        (("quant.npy", "--resume", "pipe"), "pipe is a pipe or a device"),
        (("x" * 300,), "File name too long"),
        (("loop",), "cannot be read"),
        (("quant.npy", "--rows", "loop/r.npy"), "there is no folder loop"),
    ],
)
def test_what_is_no_plain_file(capsys, folder, arguments, words):
    os.mkfifo("pipe"), os.symlink("loop", "loop")
    refused(capsys, words, "base.npy", *arguments)
    assert Path("pipe").is_fifo()


def test_a_folder_to_write_in_is_looked_at_first(capsys, folder, monkeypatch):
    """Not after everything has been computed."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    monkeypatch.delattr(Comparison, "run")
    refused(capsys, "cannot be written: no permission to write in its folder", "base.npy", "quant.npy")


@pytest.mark.parametrize("what", ["full", "spoilt", "unknown"])
def test_archives_that_cannot_be_unpacked(capsys, folder, pair, monkeypatch, what):
    save_packed("packed.npz", np.zeros((ROWS, VOCAB)))
    if what == "full":

        def fail(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(files.shutil, "copyfileobj", fail)
    else:
        content = bytearray((folder / "packed.npz").read_bytes())
        if what == "spoilt":
            content[60:80] = bytes([255] * 20)
        else:
            content[content.index(b"PK\1\2") + 10] = 99  # a method of compression
        (folder / "packed.npz").write_bytes(content)
    words = {"full": "packed.npz cannot be unpacked in .*: No space left"}
    refused(capsys, words.get(what, "packed.npz cannot be read as .npz"), "base.npy", "packed.npz")


@pytest.mark.parametrize(
    "arguments",
    [("--space", "odds"), ("--shape", "5"), ("--vocab", "0"), ("--chunk-bytes", "1x"), ("--worst", "-1"), ("--what",)],
)
def test_unknown_words(capsys, folder, arguments):
    status, out, err = compare(capsys, "base.npy", "quant.npy", *arguments)
    assert (status, out) == (2, "")
    assert arguments[0] in err


def test_a_disk_that_fills_up(folder):
    """Simulated by a limit on file sizes; existing files stay, and no partial file is left."""
    pytest.importorskip("resource")
    (folder / "rows.npy").write_bytes(b"before")
    code = """
import resource, sys
from klcore.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
sys.exit(main(["compare", *sys.argv[1:]]))
"""
    paths = [str(folder / name) for name in ("base.npy", "quant.npy")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths, "--rows", str(folder / "rows.npy"), "--force"],
        capture_output=True, text=True, timeout=60, **as_here(),
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"klcore compare: \S*rows.npy cannot be written: File too large\n", done.stderr)
    assert (folder / "rows.npy").read_bytes() == b"before"
    assert sorted(p.name for p in folder.iterdir()) == ["base.npy", "quant.npy", "rows.npy", "tokens.npy"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("where", ["full", "closed"])
def test_standard_output_that_takes_nothing(folder, where):
    paths = [str(folder / name) for name in ("base.npy", "quant.npy")]
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") if where == "full" else os.fdopen(write, "w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "klcore", "compare", *paths, "--json", str(folder / "report.json")],
            stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, **as_here(),
        )  # fmt: skip
    assert done.returncode == 2
    assert json.loads((folder / "report.json").read_text())["rows"] == 60
    assert re.fullmatch(r"klcore compare: standard output cannot be written: .*\n", done.stderr)


def test_no_standard_output(folder, monkeypatch):
    """As of a program without a console."""
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["compare", *(str(folder / f"{name}.npy") for name in ("base", "quant"))]) == 0


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--threads", "99999999999", "at most 2147483647"),
        ("--temperature", "1e-320", "must be positive and finite, and so must 1 / temperature"),
        ("--groups", "0", "not a multiple of 0"),
        ("--groups", "9" * 5000, "at most 18 digits"),
        ("--vocab", "9" * 5000, "at most 18 digits"),
        ("KLCORE_NUM_THREADS", "all", "must be a whole number"),
    ],
)
def test_numbers_out_of_range_are_wrong_input(folder, option, value, words):
    """Status 2: 1 would say that a limit is exceeded."""
    paths = [str(folder / f"{name}.npy") for name in ("base", "quant")]
    options, environment = ([option, value], {}) if option.startswith("--") else ([], {option: value})
    done = subprocess.run(
        [sys.executable, "-m", "klcore", "compare", *paths, *options],
        capture_output=True, text=True, timeout=60, **as_here(**environment),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr.splitlines()[-1]


def test_a_bar_on_a_terminal(folder):
    """And the report contains nothing that only terminals understand."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    pytest.importorskip("tqdm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    paths = [str(folder / name) for name in ("base.npy", "quant.npy")]
    here = as_here()
    here["env"] = {name: value for name, value in here["env"].items() if not name.startswith("TQDM_")}
    command = [sys.executable, "-m", "klcore", "compare", *paths]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, timeout=60, **here)
    assert done.returncode == 0
    assert select.select([ours], [], [], 0)[0], "nothing was said"
    assert b"/60.0 [" in os.read(ours, 10_000)
    assert b"\x1b" not in done.stdout
    os.close(theirs)
    os.close(ours)


def test_a_file_that_shrinks_meanwhile(capsys, folder, monkeypatch):
    plain = outputs.check_outputs

    def shrink(*arguments):
        os.truncate("quant.npy", 500)
        return plain(*arguments)

    monkeypatch.setattr(outputs, "check_outputs", shrink)
    refused(capsys, "quant.npy was truncated while it was read", "base.npy", "quant.npy")


@pytest.mark.parametrize("package", ["safetensors", "matplotlib", "ml_dtypes"])
def test_packages_that_are_missing(capsys, folder, pair, monkeypatch, package):
    arguments = {
        "safetensors": ("base.npy", "f.safetensors:logits"),
        "matplotlib": ("base.npy", "quant.npy", "--plot", "p.png"),
        "ml_dtypes": ("base.npy", "two.npy", "--dtype", "bfloat16"),
    }
    if package == "safetensors":
        save_safetensors("f.safetensors", pair[1])
    np.save("two.npy", np.zeros((ROWS, VOCAB), "V2"))
    monkeypatch.setitem(sys.modules, package, None)
    refused(capsys, rf"the package {package}: pip install 'klcore\[compare\]'", *arguments[package])


def test_the_command_itself(python):
    assert "BASE QUANT" in python("from klcore.__main__ import main; main(['compare', '--help'])")


# ---- the demo --------------------------------------------------------------------------------------------------------

DEMO = Path(__file__).parents[1] / "examples" / "compare_quantised.py"


@pytest.mark.skipif(not DEMO.exists(), reason="no examples beside the tests: these are of an installed package")
def test_the_demo_quantises(monkeypatch):
    monkeypatch.syspath_prepend(DEMO.parent)
    demo = importlib.import_module(DEMO.stem)
    weights = np.random.default_rng(0).normal(size=(96, 5)).astype(np.float32)
    for bits in (4, 8):
        for block in (32, 96):
            found = demo.rounded(weights, bits, block)
            for column, of in zip(weights.T.reshape(-1, block), found.T.reshape(-1, block), strict=True):
                scale = np.abs(column).max() / (2 ** (bits - 1) - 1)
                assert np.abs(column - of).max() <= scale / 2 * (1 + 1e-5)
                assert len(np.unique(np.rint(of / scale))) == len(np.unique(of)) <= 2**bits - 1
    assert (demo.rounded(np.zeros((32, 1), np.float32), 4, 32) == 0).all()


@pytest.mark.skipif(not DEMO.exists(), reason="no examples beside the tests: these are of an installed package")
def test_the_demo_learns(monkeypatch):
    """Its gradients agree with differences of its loss."""
    monkeypatch.syspath_prepend(DEMO.parent)
    demo = importlib.import_module(DEMO.stem)
    model = {name: a.astype(np.float64) for name, a in demo.new_model().items()}
    before, after = demo.windows(np.random.default_rng(1).integers(0, demo.VOCAB, 30))
    _, found = demo.gradients(model, before, after)
    for name, g in found.items():
        at = np.unravel_index(np.abs(g).argmax(), g.shape)
        values = []
        for step in (1e-4, -1e-4):
            moved = model | {name: model[name].copy()}
            moved[name][at] += step
            values.append(demo.gradients(moved, before, after)[0])
        assert (values[0] - values[1]) / 2e-4 == pytest.approx(g[at], rel=1e-5)
