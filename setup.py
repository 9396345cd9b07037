"""Builds the native modules with CMake; the rest of the packaging is in pyproject.toml.

``dmcp._native`` holds the kernels and fits every PyTorch. A second module holds the autograd nodes
that call them; it fits the PyTorch that is installed in this environment, and is left out where
there is none yet.

Environment: DMCP_NATIVE=AUTO|ON|OFF (AUTO: a failed build leaves the pure-Python package, ON: it is
an error, OFF: do not try), DMCP_CUDA=AUTO|ON|OFF (OFF: no CUDA kernels, ON: they are required), and
CMake's own CMAKE_ARGS, CXX, CUDACXX, CUDAARCHS.
"""

import importlib.util
import os
import re
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


HERE = Path(__file__).parent
NATIVE, CUDA = switch("DMCP_NATIVE"), switch("DMCP_CUDA")
REQUIRED = "ON" in (NATIVE, CUDA)


def installed_torch() -> Path | None:
    """The folder of PyTorch in the environment that is installed into.

    pip builds in an environment of its own, which hides the packages, but not the folder.
    """
    spec = importlib.util.find_spec("torch")
    places = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib")]
    found = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    candidates = [*found, *(Path(place) / "torch" for place in places)]
    needed = "include/torch/csrc/autograd/custom_function.h"
    return next((folder for folder in candidates if (folder / needed).is_file()), None)


def nodes_of(torch: Path | None) -> list[str]:
    """The name of the module of nodes, if one can be built: C++ that uses PyTorch fits one minor
    version of it only."""
    text = (torch / "version.py").read_text() if torch is not None else ""
    version = re.search(r"""__version__ = ['"](\d+)\.(\d+)""", text)
    return [f"dmcp._nodes_torch_{version[1]}_{version[2]}"] if version else []


TORCH = installed_torch() if NATIVE != "OFF" else None


class CMakeBuild(build_ext):
    """Builds the extensions with CMake instead of the compiler of setuptools."""

    def run(self) -> None:
        if self.inplace or self.editable_mode:
            # A failed build must not leave an earlier module in place.
            for earlier in [*HERE.glob("dmcp/_native.*.so"), *HERE.glob("dmcp/_nodes_torch_*.so")]:
                earlier.unlink()
        super().run()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        if ext.name != "dmcp._native":
            return self.build_nodes(target)
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

    def build_nodes(self, target: Path) -> None:
        try:
            self.cmake(
                target.parent, "_nodes", f"-DDMCP_TORCH={TORCH}", f"-DDMCP_NODES={target.name}"
            )
        except (OSError, subprocess.CalledProcessError) as error:
            outcome = "" if REQUIRED else "; dmcp installs without them, slower on small layers"
            raise CompileError(
                f"the autograd nodes could not be built (see above): {error}{outcome}"
            ) from error

    def build_native(self, output: Path, cuda: str) -> None:
        self.cmake(output, "_native", f"-DDMCP_CUDA={cuda}")

    def cmake(self, output: Path, target: str, *options: str) -> None:
        import pybind11  # a build requirement: the other commands of setuptools do without it

        # The tools of the environment that builds come before those of the system.
        path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=path) or "cmake"
        build = Path(self.build_temp).resolve() / "native"
        # A cache of an earlier build names tools of pip's build environment, deleted since.
        fresh = ["--fresh"] if target == "_native" else []
        configure = [
            *(cmake, *fresh, "-S", str(HERE), "-B", str(build)),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={output}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            *options,
            *(["-GNinja"] if shutil.which("ninja", path=path) else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        environment = {**os.environ, "PATH": path}
        subprocess.run(configure, check=True, env=environment)
        compile = [cmake, "--build", str(build), "--parallel", "--target", target]
        subprocess.run(compile, check=True, env=environment)


# In this order: the second build goes on from the first.
modules = ["dmcp._native", *nodes_of(TORCH)]
native = [Extension(name, sources=[], optional=not REQUIRED) for name in modules]
setup(
    packages=[*find_packages(include=["dmcp", "dmcp.*"]), "dmcp.kernels"],
    package_dir={"dmcp.kernels": "kernels"},
    ext_modules=[] if NATIVE == "OFF" else native,
    cmdclass={"build_ext": CMakeBuild},
)
