"""The CUDA compiler and its cache, on machines without a GPU: what is compiled, what is cached, and what can go
wrong."""

import importlib
import importlib.resources
import importlib.util
import re
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from conftest import as_here

import klcore

nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
nvidia = importlib.import_module("nvidia") if importlib.util.find_spec("nvidia") else None

try:
    nvrtc.version()
except klcore.BackendUnavailableError as error:  # not in CI: make cuda-check would fail
    pytest.skip(str(error), allow_module_level=True)

TOY = """
extern "C" __global__ void toy(float* y, const float* x) {
  y[threadIdx.x] = x[0] * x[1] + x[2] / FACTOR;
}
"""
OPTIONS = ("-DFACTOR=3.f",)
FAST = ("--use_fast_math", "--ftz=true", "--fmad=true", "--prec-div=false", "--prec-sqrt=false")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KLCORE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def toy(folder, monkeypatch):
    """A small kernel in place of klcore's; the list of what was compiled."""
    compiled = []
    true = nvrtc._compile

    def compile(*arguments):
        compiled.append(arguments[1:])
        return true(*arguments)

    monkeypatch.setattr(nvrtc, "source", lambda: TOY)
    monkeypatch.setattr(nvrtc, "_compile", compile)
    return compiled


# ---- the source ------------------------------------------------------------------------------------------------------


def test_source_has_every_file_once():
    text = nvrtc.source()
    assert re.findall(r'#line 1 "(.*)"', text) == list(nvrtc.SOURCES)
    assert not re.search(r"#\s*pragma\s+once", text)
    assert not re.search(r'#\s*include\s*"', text)
    for name in nvrtc.SOURCES:
        own = importlib.resources.files("klcore._src").joinpath(name).read_text().splitlines()
        kept = text.split(f'#line 1 "{name}"\n')[1].splitlines()[: len(own)]
        changed = [line for line, now in zip(own, kept, strict=True) if line != now]
        assert all(re.match(r"\s*#\s*(pragma\s+once|include)", line) for line in changed)


def test_an_error_names_file_and_line():
    mark = '#line 1 "kl_tree.h"\n'
    broken = nvrtc.source().replace(mark, mark + "\nint broken = ;\n")
    with pytest.raises(RuntimeError, match=r"kl_tree\.h\(2\): error"):
        nvrtc.compile(broken, (), 90)


# ---- the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [75, 90])
def test_compiles(arch):
    cubin = nvrtc.compile(TOY, OPTIONS, arch)
    assert cubin.startswith(b"\x7fELF")
    assert b"toy" in cubin
    assert f"sm_{arch}".encode() in cubin


def test_version_and_architectures():
    assert nvrtc.version() >= (12, 0)
    assert set(nvrtc.supported()) >= {75, 80, 86, 89, 90}
    assert list(nvrtc.supported()) == sorted(nvrtc.supported())


def test_an_error_quotes_options_and_log():
    with pytest.raises(RuntimeError, match=r"(?s)sm_90 with -DOTHER=1.*FACTOR"):
        nvrtc.compile(TOY, ("-DOTHER=1",), 90)


def ptx(monkeypatch, options):
    """NVRTC keeps the assembly text beside the cubin."""
    read = nvrtc._read
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "_read", lambda name, program: read(name.replace("CUBIN", "PTX"), program))
        return nvrtc.compile(TOY, options, 90).decode()


def test_arithmetic_is_ieee_whatever_the_options(monkeypatch):
    text = ptx(monkeypatch, (*FAST, *OPTIONS))
    assert "mul.f32" in text or "mul.rn.f32" in text
    assert "div.rn.f32" in text
    assert re.findall(r"\.ftz|\bfma|approx|\.full", text) == []
    with monkeypatch.context() as patch:  # the pattern finds what it should
        patch.setattr(nvrtc, "_OPTIONS", ())
        assert re.findall(r"\.ftz", ptx(monkeypatch, (*FAST, *OPTIONS)))


@pytest.mark.parametrize(
    ("version", "arch", "words"),
    [
        ((13, 0), 70, ("7.0", 'pip install "klcore[cuda12]"')),
        ((13, 0), 130, ("13.0", "pip install --upgrade nvidia-cuda-nvrtc")),
        ((12, 9), 130, ("nvidia-cuda-nvrtc-cu12", 'pip install "klcore[cuda13]"')),
        ((13, 0), 61, ("6.1", "klcore needs 7.0")),
    ],
)
def test_an_unknown_architecture_names_the_remedy(monkeypatch, version, arch, words):
    monkeypatch.setattr(nvrtc, "version", lambda: version)
    monkeypatch.setattr(nvrtc, "supported", lambda: (75, 80, 90, 120))
    with pytest.raises(klcore.BackendUnavailableError) as caught:
        nvrtc.compile(TOY, OPTIONS, arch)
    assert [word for word in words if word not in str(caught.value)] == []


PRELOADED = """
import ctypes, sys
other = ctypes.CDLL(sys.argv[1])  # as PyTorch loads it, and leaves its other half alone
from klcore.backends.cuda import nvrtc
library = nvrtc._load(sys.argv[1])
nvrtc._library = lambda: library
print("builtins" if "libnvrtc-builtins" in open("/proc/self/maps").read() else "half of it")
nvrtc.compile(sys.argv[2], (), 90)
"""
WITHOUT_PATHFINDER = """
import sys
sys.modules["cuda.pathfinder"] = None
from klcore.backends.cuda import nvrtc
nvrtc.compile(sys.argv[1], (), 90)
print(nvrtc._library()._name)
"""
BY_PIP = sorted(str(p) for root in (nvidia.__path__ if nvidia else ()) for p in Path(root).glob("*/lib/libnvrtc.so.1?"))


@pytest.mark.skipif(not BY_PIP, reason="NVRTC is not here as a package of pip's")
@pytest.mark.parametrize("path", BY_PIP, ids=lambda path: Path(path).name)
def test_whoever_has_loaded_it_before(python, path):
    """Not all of NVIDIA's packages link the library to its other half, which NVRTC needs to compile."""
    assert python(PRELOADED, path, TOY.replace("FACTOR", "3")).strip() == "builtins"


@pytest.mark.skipif(not BY_PIP, reason="NVRTC is not here as a package of pip's")
def test_found_without_pathfinder(python):
    assert python(WITHOUT_PATHFINDER, TOY.replace("FACTOR", "3")).strip() in BY_PIP


def test_a_missing_compiler_is_named(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", missing)
    with pytest.raises(klcore.BackendUnavailableError, match="NVRTC") as caught:
        nvrtc._library.__wrapped__()
    for extra in ("cuda13", "cuda12"):
        assert f'"klcore[{extra}]"' in str(caught.value)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_build_compiles_once(toy, folder):
    path = nvrtc.build(OPTIONS, 90)
    assert path.parent == folder
    assert path.read_bytes() == nvrtc.compile(TOY, OPTIONS, 90)
    toy.clear()
    assert nvrtc.build(OPTIONS, 90) == path
    assert toy == []
    assert list(folder.iterdir()) == [path]


def test_everything_that_matters_is_in_the_key(toy, monkeypatch):
    keys = [nvrtc._key(OPTIONS, 90), nvrtc._key(("-DFACTOR=4.f",), 90), nvrtc._key(OPTIONS, 80), nvrtc._key((), 90)]
    for name, value in (("source", lambda: TOY + " "), ("version", lambda: (99, 0)), ("_OPTIONS", ())):
        with monkeypatch.context() as patch:
            patch.setattr(nvrtc, name, value)
            keys.append(nvrtc._key(OPTIONS, 90))
    assert len(set(keys)) == len(keys)
    assert keys[0] == nvrtc._key(OPTIONS, 90)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: data[:-1] + b"?"])
def test_a_damaged_entry_is_made_again(toy, damage):
    path = nvrtc.build(OPTIONS, 90)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert nvrtc.build(OPTIONS, 90).read_bytes() == good
    assert len(toy) == 2


def test_an_entry_under_another_name_is_not_trusted(toy, folder):
    path = nvrtc.build(OPTIONS, 90)
    other = nvrtc.build(("-DFACTOR=4.f",), 90)
    other.replace(path)
    nvrtc.build(OPTIONS, 90)
    assert len(toy) == 3


def test_many_processes_make_one_entry(folder, tmp_path):
    code = f"""
import importlib, pathlib, sys, time
nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
nvrtc.source = lambda: {TOY!r}
nvrtc.supported()
pathlib.Path(sys.argv[1], f"ready{{sys.argv[2]}}").touch()
while not pathlib.Path(sys.argv[1], "go").exists():
    time.sleep(0.001)
print(nvrtc._digest(nvrtc.build({OPTIONS!r}, 90).read_bytes()))
"""
    workers = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(n)], stdout=subprocess.PIPE, text=True, **as_here())
        for n in range(8)
    ]
    end = time.monotonic() + 600
    while len(list(tmp_path.glob("ready*"))) < len(workers) and time.monotonic() < end:
        time.sleep(0.01)
    (tmp_path / "go").touch()
    digests = [worker.communicate(timeout=600)[0].strip() for worker in workers]
    (entry,) = folder.iterdir()  # no unfinished files are left
    assert entry.stem.endswith(nvrtc._digest(entry.read_bytes()))
    assert digests == [entry.stem.rpartition("-")[2]] * len(workers)


def test_many_threads_compile_once(toy):
    found = []
    threads = [threading.Thread(target=lambda: found.append(nvrtc.build(OPTIONS, 90))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(toy) == 1


def test_a_directory_that_cannot_be_is_told_once(toy, tmp_path, monkeypatch):
    """Below a regular file, where not even root can write."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("KLCORE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(nvrtc, "_private", None)
    with pytest.warns(UserWarning, match="KLCORE_CACHE_DIR") as caught:
        path = nvrtc.build(OPTIONS, 90)
    assert len(caught) == 1
    assert str(tmp_path / "file" / "cache") in str(caught[0].message)
    assert path.read_bytes().startswith(b"\x7fELF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert nvrtc.build(OPTIONS, 90) == path
        assert len(toy) == 1
        other = nvrtc.build(("-DFACTOR=4.f",), 90)
    assert other.parent == path.parent


def test_the_private_directory_ends_with_the_process(python, tmp_path):
    (tmp_path / "file").touch()
    code = f"""
import importlib
nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
nvrtc.source = lambda: {TOY!r}
print(nvrtc.build({OPTIONS!r}, 90))
"""
    path = Path(python(code, warnings="ignore", KLCORE_CACHE_DIR=tmp_path / "file").strip())
    assert path.suffix == ".cubin"
    assert not path.parent.exists()


def test_the_default_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("KLCORE_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for platform, variable, value, expected in (
        ("linux", "XDG_CACHE_HOME", None, tmp_path / ".cache" / "klcore"),
        ("linux", "XDG_CACHE_HOME", "relative/is/ignored", tmp_path / ".cache" / "klcore"),
        ("linux", "XDG_CACHE_HOME", str(tmp_path / "xdg"), tmp_path / "xdg" / "klcore"),
        ("darwin", "XDG_CACHE_HOME", None, tmp_path / "Library" / "Caches" / "klcore"),
        ("win32", "LOCALAPPDATA", str(tmp_path / "local"), tmp_path / "local" / "klcore"),
        ("win32", "LOCALAPPDATA", None, tmp_path / "AppData" / "Local" / "klcore"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", platform)
            patch.delenv(variable, raising=False)
            if value:
                patch.setenv(variable, value)
            assert nvrtc._folder() == expected


def test_a_home_that_is_unknown_is_no_error(toy, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("KLCORE_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(nvrtc, "_private", None)
    with pytest.warns(UserWarning, match="home directory"):
        assert nvrtc.build(OPTIONS, 90).exists()


# ---- alone -----------------------------------------------------------------------------------------------------------


def test_needs_no_cupy(python):
    code = f"""
import importlib, sys
sys.modules["cupy"] = None
nvrtc = importlib.import_module("klcore.backends.cuda.nvrtc")
assert nvrtc.compile({TOY!r}, {OPTIONS!r}, 90)
print("numpy" in sys.modules["klcore"].__dict__)
"""
    assert python(code).strip() == "False"
