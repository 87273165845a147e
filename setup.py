"""What pyproject.toml cannot express: the extension, its OpenMP flags per compiler, and the README as PyPI shows it."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

NO_OPENMP = os.environ.get("KLCORE_NO_OPENMP") == "1"
SANITIZE = os.environ.get("KLCORE_SANITIZE")  # gcc's or clang's sanitizers, for `make fuzz`: address,undefined

# The same bits everywhere: no contraction, no fast-math. -fno-thread-jumps (below) keeps gcc from splitting selects,
# which its vectoriser needs whole; the other two -fno- flags say that nobody reads errno or the exception flags.
FLAGS = {
    "msvc": (["/O2", "/std:c++17", "/EHsc", "/fp:precise"], []),
    "unix": (
        [
            *("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
            *("-fvisibility=hidden", "-pthread"),
        ],
        ["-pthread"],
    ),
}
OPENMP = {
    "msvc": (["/openmp"], []),
    "darwin": (["-Xpreprocessor", "-fopenmp"], ["-lomp"]),
    "unix": (["-fopenmp"], ["-fopenmp"]),
}


class build(build_ext):
    def build_extension(self, ext):
        kind = "msvc" if self.compiler.compiler_type == "msvc" else "unix"
        openmp = OPENMP["darwin" if sys.platform == "darwin" else kind]
        ext.extra_compile_args += FLAGS[kind][0] + ([] if NO_OPENMP else openmp[0])
        ext.extra_link_args += FLAGS[kind][1] + ([] if NO_OPENMP else openmp[1])
        if NO_OPENMP:
            ext.define_macros.append(("KLCORE_NO_OPENMP", "1"))
        if kind == "unix" and "clang" not in " ".join(self.compiler.compiler_cxx) and sys.platform != "darwin":
            ext.extra_compile_args.append("-fno-thread-jumps")
        if SANITIZE:
            # this processor's instruction set alone: compiling all three takes three minutes
            ext.extra_compile_args += ["-O1", "-g1", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
            ext.extra_compile_args += ["-march=native", "-DKLCORE_ONE_ISA"]
            ext.extra_link_args.append(f"-fsanitize={SANITIZE}")
        if kind == "msvc" and not self.compiler.initialized:
            self.compiler.initialize()  # once, not in each thread
        one_after_the_other = self.compiler.compile

        def compile(sources, **options):  # setuptools leaves all processors but one idle, for a minute or two
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: one_after_the_other([source], **options), sources)
                return list(chain.from_iterable(objects))

        self.compiler.compile = compile
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            if NO_OPENMP:
                raise
            raise type(error)(
                f"{error}\n\nklcore's CPU kernels need a C++17 compiler with OpenMP, and this one failed with "
                f"{' '.join(openmp[0] + openmp[1])}. Install one (Debian: apt-get install g++; macOS: brew install "
                "libomp), or set KLCORE_NO_OPENMP=1 to build for one thread."
            ) from error


def readme():
    """README.md for PyPI, where no files stand beside it: its links and pictures are those of the repository."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?:)", "](https://github.com/klcore/klcore/blob/main/", text)
    return re.sub(r'(src|srcset)="(?!https?:)', r'\1="https://raw.githubusercontent.com/klcore/klcore/main/', text)


setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    ext_modules=cythonize(
        Extension(
            "klcore._cpu",
            # the slowest first
            ["src/kl_isa_avx512.cpp", "src/kl_isa_avx2.cpp", "src/kl_isa_generic.cpp", "src/kl_cpu.pyx"],
            include_dirs=["src"],
            depends=sorted(glob("src/*.h")),
            language="c++",
        ),
        compiler_directives={"language_level": 3},
    ),
    cmdclass={"build_ext": build},
)
