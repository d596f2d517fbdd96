"""Builds the sparse CPU kernels (csrc) beside the package, where there is a compiler for them.

They are a plain shared library behind a C interface: no Python, no PyTorch headers, one build for
every Python and torch. Without it the package installs and works; `gossamer.runtime` says at use
that the kernels are missing and why. Everything else about the package is in pyproject.toml.
"""

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
COMMON = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-Wall", "-Wextra"]
COMMON += ["-fvisibility=hidden"]
# The same kernels once per instruction set; which of them runs is decided by the CPU at run time.
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mprefer-vector-width=512"]
AVX512 += [f"-mavx512{extension}" for extension in ("f", "bw", "vl", "dq")]
X86 = {"kernels_avx2.cpp": AVX2, "kernels_avx512.cpp": AVX512}


class BuildKernels(build_ext):
    """Compiles every source with flags of its own."""

    def build_extension(self, extension: Extension) -> None:
        """Objects of all sources that this processor can use, linked into one library."""
        x86 = platform.machine() in ("x86_64", "AMD64")
        objects = []
        for source in extension.sources:
            own = X86.get(Path(source).name, [])
            if own and not x86:
                continue
            objects += self.compiler.compile(
                [source],
                output_dir=self.build_temp,
                macros=[("GSM_X86", "1")] if x86 else [],
                extra_postargs=COMMON + own,
                depends=extension.depends,
            )
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(extension.name),
            libraries=["dl", "pthread"] if sys.platform == "linux" else [],
            target_lang="c++",
        )

    def get_ext_filename(self, fullname: str) -> str:
        """A name without the Python version, on which nothing in it depends."""
        return str(Path(*fullname.split("."))) + ".so"


def kernels() -> list[Extension]:
    """The extension; none on Windows, whose compiler has no vectors as GCC and Clang have."""
    if sys.platform == "win32":
        return []
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    headers = sorted(str(path) for path in SOURCES.glob("*.h"))
    name = "gossamer.runtime._kernels"
    return [Extension(name, sources, depends=headers, optional=True, language="c++")]


setup(ext_modules=kernels(), cmdclass={"build_ext": BuildKernels})
