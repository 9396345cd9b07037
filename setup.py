"""Builds the native module with CMake; the rest of the packaging is in pyproject.toml.

Environment: DMCP_NATIVE=AUTO|ON|OFF (AUTO: a failed build leaves the pure-Python package, ON: it is
an error, OFF: do not try), DMCP_CUDA=AUTO|ON|OFF (OFF: no CUDA kernels, ON: they are required), and
CMake's own CMAKE_ARGS, CXX, CUDACXX, CUDAARCHS.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError


def switch(name: str) -> str:
    value = os.environ.get(name, "AUTO").upper()
    if value not in ("AUTO", "ON", "OFF"):
        raise OptionError(f"{name} must be AUTO, ON or OFF, got {value!r}")
    return value


NATIVE, CUDA = switch("DMCP_NATIVE"), switch("DMCP_CUDA")
REQUIRED = "ON" in (NATIVE, CUDA)


class CMakeBuild(build_ext):
    """Builds an extension with CMake instead of the compiler of setuptools."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)  # a failed build must not leave an earlier module in place
        attempts = ["AUTO", "OFF"] if CUDA == "AUTO" else [CUDA]
        for cuda in attempts:
            try:
                return self.build_native(target.parent, cuda)
            except (OSError, subprocess.CalledProcessError) as error:
                self.warn(f"building dmcp._native with DMCP_CUDA={cuda} failed: {error}")
        outcome = (
            "" if REQUIRED else "; dmcp installs without it and runs every op in plain PyTorch"
        )
        raise CompileError(f"dmcp._native could not be built (see above){outcome}")

    def build_native(self, output: Path, cuda: str) -> None:
        import pybind11  # a build requirement: the other commands of setuptools do without it

        # The tools of the environment that builds come before those of the system.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=path) or "cmake"
        build = Path(self.build_temp).resolve() / "native"
        configure = [
            # A cache of an earlier build names tools of pip's build environment, deleted since.
            *(cmake, "--fresh", "-S", str(Path(__file__).parent), "-B", str(build)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDMCP_CUDA={cuda}",
            *(["-GNinja"] if shutil.which("ninja", path=path) else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        environment = {**os.environ, "PATH": path}
        subprocess.run(configure, check=True, env=environment)
        subprocess.run([cmake, "--build", str(build), "--parallel"], check=True, env=environment)


native = [] if NATIVE == "OFF" else [Extension("dmcp._native", sources=[], optional=not REQUIRED)]
setup(
    packages=[*find_packages(include=["dmcp", "dmcp.*"]), "dmcp.kernels"],
    package_dir={"dmcp.kernels": "kernels"},
    ext_modules=native,
    cmdclass={"build_ext": CMakeBuild},
)
