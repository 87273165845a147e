"""The ways to install: sdist, wheel from the sdist without the sources at hand, and a build that cannot have OpenMP."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("no setup.py beside the tests: these are of an installed package", allow_module_level=True)
pytest.importorskip("Cython", reason="Cython, which builds klcore, is not installed here")


def run(*command, cwd=None, env=None):
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


def pip_wheel(sdist, target, **env):
    """Build a wheel from a copy of the unpacked sdist, so that nothing built before is found."""
    source = shutil.copytree(sdist, target / "source")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        str(target),
        str(source),
    ]
    return run(*command, env=env)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """An sdist of the tree, unpacked."""
    out = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(out)!r}))"
    status, text = run(sys.executable, "-c", code, cwd=ROOT)
    assert status == 0, text
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        archive.extractall(out, filter="data")
    return next(p for p in out.iterdir() if p.is_dir())


def test_sdist_is_complete(sdist):
    names = {p.name for p in (sdist / "src").iterdir()}
    sources = {p.name for p in (ROOT / "src").iterdir() if p.suffix in {".h", ".cpp", ".pyx", ".py", ".cu"}}
    assert names >= sources - {"kl_cpu.cpp"}
    assert "kl_cpu.cpp" not in names
    assert (sdist / "LICENSE").is_file()
    assert {"conftest.py", "oracle.py", "emulator", "golden"} <= {p.name for p in (sdist / "tests").iterdir()}


def test_readme_on_pypi_links_to_the_repository(sdist):
    text = (sdist / "PKG-INFO").read_text(encoding="utf-8")
    links = re.findall(r'(?:\]\(|src="|srcset=")([^)"]+)', text)
    assert len(links) > 5
    assert all(link.startswith("https://") for link in links)
    assert all((ROOT / path).exists() for path in re.findall(r"klcore/klcore/(?:blob/)?main/([^)\"\s]+)", text))


def stand_in(folder, command):
    """A compiler: words for pip_wheel."""
    compiler = folder / "c++"
    compiler.write_text(f"#!/bin/sh\n{command}\n")
    compiler.chmod(0o755)
    return {"CC": str(compiler), "CXX": str(compiler)}


@pytest.mark.exhaustive
def test_wheel_of_the_sdist(sdist, tmp_path):
    """Without optimisation, which takes a minute: that the flags work is seen by whoever builds klcore to test it."""
    status, text = pip_wheel(sdist, tmp_path, **stand_in(tmp_path, 'exec c++ "$@" -O0'))
    assert status == 0, text
    wheel = next(tmp_path.glob("klcore-*.whl"))
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert {"klcore/py.typed", "klcore/_cpu.pyi"} <= set(names)
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "klcore").rglob("*.py")}  # of all folders
    assert {n for n in modules if not n.startswith("klcore/_src")} <= set(names)
    shipped = {p.name for p in (ROOT / "src").iterdir() if p.suffix in {".h", ".cu"}} | {"__init__.py"}
    assert {n.removeprefix("klcore/_src/") for n in names if n.startswith("klcore/_src/")} == shipped
    assert {n.partition("/")[0].partition("-")[0] for n in names} == {"klcore"}
    assert [n for n in names if n.endswith((".pyx", ".cpp"))] == []
    assert [n for n in names if n.endswith("licenses/LICENSE")]
    code = "import klcore; print(klcore.__file__, klcore.kl_div([0.5, 0.5], [0.9, 0.1]))"
    without_compiler = {"PYTHONPATH": str(site), "PATH": str(tmp_path / "nothing")}
    status, text = run(sys.executable, "-c", code, cwd=tmp_path, env=without_compiler)
    assert status == 0, text
    assert text.split() == [str(site / "klcore" / "__init__.py"), "0.5108256237659906"]


@pytest.mark.exhaustive
def test_a_compiler_without_openmp_is_told(sdist, tmp_path):
    """A stand-in compiler that refuses -fopenmp, as some do."""
    refusing = 'for a in "$@"; do [ "$a" = -fopenmp ] && exit 1; done\nexec c++ "$@"'
    status, text = pip_wheel(sdist, tmp_path, **stand_in(tmp_path, refusing), KLCORE_NO_OPENMP="0")
    assert status != 0
    assert "OpenMP" in text
    assert "KLCORE_NO_OPENMP=1" in text
