"""`klcore compare` on two large files, compared with `cat` and with the loops people write; and klcore.Summary.

    python benchmarks/compare.py [--gigabytes 4] [--folder /tmp] [--loop-rows 512]

Creates two files of float32 logits of that many gigabytes each (and keeps them for the next run), and measures: `cat`
of both, with and without the files in the system's cache; `klcore compare` in full and with --quick, time and peak
memory; a NumPy loop and a PyTorch loop over the first rows, for all figures (KL both ways, Jensen-Shannon, total
variation, agreement). Then it checks Summary on a million rows against the exact results, with four random splits and
merge orders.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

import klcore

VOCAB = 131_072
PART = 64  # rows at a time, when creating files


def make(path, rows, seed, like=None):
    if path.exists() and path.stat().st_size > 4 * rows * VOCAB:
        return
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, VOCAB))
    first = None if like is None else np.load(like, mmap_mode="r")
    for k in tqdm(range(0, rows, PART), desc=f"making {path.name}", leave=False, disable=None):
        rng = np.random.default_rng([seed, k])
        noise = rng.standard_normal((min(PART, rows - k), VOCAB), np.float32)
        out[k : k + PART] = 3 * noise if first is None else first[k : k + PART] + np.float32(0.1) * noise
    out.flush()


def forget(paths):
    """Drop the files from the system's cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# In an interpreter that holds nothing in memory: the memory of a parent counts towards the peak of its child.
WATCH = """
import json, os, resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
seconds, used = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([status, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def run(command):
    """Seconds, processor seconds, and megabytes at the peak."""
    watched = subprocess.run([sys.executable, "-S", "-c", WATCH, *command], stdout=subprocess.PIPE, check=True)
    status, *found = json.loads(watched.stdout)
    assert status == 0, command
    return found


def numpy_loop(x, y):
    """One row at a time, in float64, as in scripts posted in issues."""
    for a, b in zip(x, y, strict=True):
        p, q = (np.exp(z - z.max()) for z in (a.astype(np.float64), b.astype(np.float64)))
        p, q = p / p.sum(), q / q.sum()
        m = (p + q) / 2
        log_p, log_q, log_m = np.log(p), np.log(q), np.log(m)
        yield (
            (p * (log_p - log_q)).sum(), (q * (log_q - log_p)).sum(), np.abs(p - q).sum() / 2,
            ((p * (log_p - log_m)).sum() + (q * (log_q - log_m)).sum()) / 2, a.argmax() == b.argmax(),
        )  # fmt: skip


def torch_loop(x, y, batch=16):
    import torch

    for k in range(0, len(x), batch):
        a, b = (torch.from_numpy(np.array(z[k : k + batch])) for z in (x, y))
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        log_m = ((p + q) / 2).log()
        js = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2
        kl, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
        yield from zip(kl, reverse, (p - q).abs().sum(-1) / 2, js, a.argmax(-1) == b.argmax(-1), strict=True)


def files(folder, gigabytes, loop_rows):
    rows = round(gigabytes * 1e9 / 4 / VOCAB)
    base, quant = (folder / f"klcore-{name}-{rows}.npy" for name in ("base", "quant"))
    # by another process: the memory that this one has used would count towards the peak of its children
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(make, base, rows, 0).result()
        pool.submit(make, quant, rows, 1, base).result()
    command = [sys.executable, "-m", "klcore", "compare", str(base), str(quant)]
    contenders = {"cat": ["cat", str(base), str(quant)], "full": command, "quick": [*command, "--quick"]}
    found = {"rows": rows, "vocab": VOCAB, "gigabytes of a file": 4 * rows * VOCAB / 1e9}
    for name, line in contenders.items():
        for state in ("cold", "warm"):
            if state == "cold":
                forget((base, quant))
            else:
                run(["cat", str(base), str(quant)])
            seconds, processor, megabytes = run(line)
            found[f"{name}, {state}"] = {"seconds": seconds, "processor seconds": processor, "peak MB": megabytes}
            print(
                f"{name:<6} {state:<5} {seconds:8.2f} s   {processor:8.2f} s of processors   {megabytes:6.0f} MB",
                flush=True,
            )
    x, y = (np.load(path, mmap_mode="r")[:loop_rows] for path in (base, quant))
    for name, loop in (("NumPy", numpy_loop), ("PyTorch", torch_loop)):
        started = time.perf_counter()
        means = np.mean([[float(v) for v in row] for row in loop(x, y)], axis=0)
        seconds = (time.perf_counter() - started) * rows / len(x)
        found[f"{name} loop"] = {"seconds": seconds, "rows measured": len(x)}
        print(f"{name} loop: {seconds:.1f} s, from {len(x)} rows; mean KL there {means[0]:.6g}", flush=True)
    return found


def summary(values=1_000_000):
    rng = np.random.default_rng(0)
    groups = np.arange(values) // 512
    x = np.exp(rng.normal(-6, 1, values) + 0.8 * rng.normal(size=groups[-1] + 1)[groups]).astype(np.float32)
    times = {}
    for name, given in (("plain", None), ("with groups", groups)):
        best = math.inf
        for _ in range(5):
            started = time.perf_counter()
            whole = klcore.Summary().update(x, groups=given)
            best = min(best, time.perf_counter() - started)
        times[name] = values / best / 1e6
        print(f"Summary, {name}: {values / best / 1e6:.1f} million values a second")
    exact = math.fsum(x.tolist()) / values
    q = np.array([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999])
    wrong = np.abs(whole.quantile(q) / np.quantile(x.astype(np.float64), q) - 1).max()
    print(f"mean {whole.mean!r}, by math.fsum {exact!r}; quantiles within {wrong:.1e} of NumPy's")
    print(f"error {whole.stderr():.3e} clustered, {whole.stderr(cluster=False):.3e} as if rows were independent")
    assert whole.mean == exact
    for seed in range(4):
        rng = np.random.default_rng(seed)
        cuts = np.sort(rng.integers(0, values, 20))
        bounds = list(zip([0, *cuts], [*cuts, values], strict=True))
        rng.shuffle(bounds)
        parts = [klcore.Summary().update(x[a:b], groups=groups[a:b], start=int(a)) for a, b in bounds]
        while len(parts) > 1:
            one = parts.pop(rng.integers(len(parts)))
            parts.append(one + parts.pop(rng.integers(len(parts))))
        assert parts[0] == whole
    print("four random splits, orders and trees of merges: the same bits")
    return {"million values a second": times, "largest error of a quantile": float(wrong)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4, help="of each file")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"))
    parser.add_argument("--loop-rows", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write a record there")
    a = parser.parse_args()
    config = klcore.show_config(mode="dicts")
    versions, processor = config["libraries"], config["cpu"]
    record = {
        "klcore": klcore.__version__,
        "python": platform.python_version(),
        **{name: versions[name] for name in ("numpy", "torch")},
        **{name: processor[name] for name in ("processor", "instruction set in use", "threads")},
        "load before": os.getloadavg(),
        "summary": summary(),
        "files": files(a.folder, a.gigabytes, a.loop_rows),
        "load after": os.getloadavg(),
    }
    if a.json:
        a.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
