"""Builds the native code: csrc/*.cpp into one plain shared object that is loaded with ctypes.

It has a C interface and touches no Python header, so one wheel serves every Python 3 of a platform. The files choose
their instruction sets themselves, so no flag depends on the machine that builds. Where no compiler is found the
package is installed without it, and runs through torch. Everything else about the package is in pyproject.toml.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
COMPILE_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-pthread", *WARNINGS]
LINK_FLAGS = ["-shared", "-pthread"]


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler: $CXX, or the first of g++, clang++ and c++ that is installed."""
    if os.environ.get("CXX"):
        return os.environ["CXX"].split()
    found = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    return [found] if found else None


class BuildNative(build_ext):
    """Compile with g++ or clang++ directly: setuptools would add the flags and the file name of a Python extension."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of the shared object, with no Python ABI in its name."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile the files side by side and link them; without a compiler say so and go on."""
        command = compiler()
        output = Path(self.get_ext_fullpath(ext.name))
        if command is None:
            self.warn("no C++ compiler was found (g++, clang++ or $CXX): installing without the native kernels")
            output.unlink(missing_ok=True)
            return
        objects = Path(self.build_temp)
        objects.mkdir(parents=True, exist_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)

        def compile_one(source: str) -> str:
            target = str(objects / (Path(source).stem + ".o"))
            subprocess.run([*command, *COMPILE_FLAGS, "-c", str(ROOT / source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(max_workers=os.cpu_count()) as jobs:
            compiled = list(jobs.map(compile_one, ext.sources))
        # A new file instead of a changed one: a running process may have the old one mapped.
        fresh = output.with_name(output.name + ".new")
        subprocess.run([*command, *LINK_FLAGS, *compiled, "-o", str(fresh)], check=True)
        fresh.replace(output)

    def get_outputs(self) -> list[str]:
        """Leave out what could not be built."""
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Put the shared object beside the sources (--inplace, editable installs), if there is one."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                target = ROOT / "src" / self.get_ext_filename(ext.name)
                fresh = target.with_name(target.name + ".new")
                shutil.copyfile(built, fresh)
                fresh.replace(target)


class NativeDistribution(Distribution):
    """A wheel with the shared object belongs to one platform."""

    def has_ext_modules(self) -> bool:
        """Return True: setuptools would otherwise call the wheel pure."""
        return True


class PlatformWheel(bdist_wheel):
    """Tag the wheel py3-none-PLATFORM: no Python ABI is used."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag of this wheel."""
        return "py3", "none", super().get_tag()[2]


if sys.platform == "win32":
    NATIVE = []
else:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.h"))
    NATIVE = [Extension("secateur.runtime._kernels", sources=sources, depends=headers)]

setup(
    ext_modules=NATIVE,
    distclass=NativeDistribution,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
