"""Build driver: CMake compiles the native libraries, setuptools packs them.

MIMNET_FAST_BUILD says what to compile:

- auto (default): the CPU libraries, and the CUDA library where nvcc is on PATH and torch is a CUDA
  build; what does not compile is left out with a warning
- none: nothing, a pure Python package
- cpu: the CPU libraries, or fail
- cuda: the CPU and the CUDA libraries, or fail; a CPU build of torch is enough to compile them

TORCH_CUDA_ARCH_LIST ("9.0", "8.0;9.0+PTX") names the GPUs to compile for; without it all that nvcc
and the kernels support, and PTX for later ones. MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL limits the
parallel compiler processes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from functools import cached_property
from itertools import dropwhile, islice
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
PACKAGE = "mimnet_fast"
LIBRARIES_OF_MODE = {
    "auto": ("_C", "_host", "_C_cuda"),
    "none": (),
    "cpu": ("_C", "_host"),
    "cuda": ("_C", "_host", "_C_cuda"),
}
ALL_LIBRARIES = LIBRARIES_OF_MODE["cuda"]
MINIMUM_TORCH = (2, 11)
CUDA_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")

FIND_TORCH = """
import importlib.metadata, importlib.util, json
spec = importlib.util.find_spec("torch")
if spec is not None and spec.submodule_search_locations:
    print(json.dumps([spec.submodule_search_locations[0], importlib.metadata.version("torch")]))
"""


class BuildError(CompileError):
    """A native library cannot be built; the message says why and what to do."""


def build_mode() -> str:
    mode = os.environ.get("MIMNET_FAST_BUILD", "auto")
    if mode not in LIBRARIES_OF_MODE:
        raise SystemExit(
            f"MIMNET_FAST_BUILD: got {mode!r}, need one of {', '.join(LIBRARIES_OF_MODE)}"
        )
    if mode == "cuda" and shutil.which("nvcc") is None:
        raise SystemExit(
            "MIMNET_FAST_BUILD=cuda: nvcc is not on PATH. Install the CUDA toolkit and add its "
            "bin folder to PATH, or use MIMNET_FAST_BUILD=cpu."
        )
    return mode


def cuda_architectures() -> list[str]:
    """Compute capabilities to compile for, as in TORCH_CUDA_ARCH_LIST: "9.0", "12.0+PTX"."""
    chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if chosen:
        return chosen
    listing = subprocess.run(
        ["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True
    )
    known = [a for a in CUDA_ARCHITECTURES if f"sm_{a.replace('.', '')}" in listing.stdout.split()]
    return [*known[:-1], f"{known[-1]}+PTX"]


def cmake_architectures(architectures: list[str]) -> str:
    """The same as CMake writes them: "80-real;120" (machine code alone; with PTX)."""
    numbers = [a.replace(".", "") for a in architectures]
    return ";".join(a.removesuffix("+PTX") if "+" in a else f"{a}-real" for a in numbers)


def find_torch() -> tuple[Path, str]:
    """Folder and version of the torch that this interpreter has.

    Under build isolation site-packages is hidden from sys.path but not from disk: pip hides it with
    PYTHONPATH, so the same interpreter started with -E sees it.
    """
    for flags in ([], ["-E"]):
        found = subprocess.run(
            [sys.executable, *flags, "-c", FIND_TORCH], capture_output=True, text=True, check=True
        ).stdout
        if found:
            folder, version = json.loads(found)
            if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TORCH:
                needed = ".".join(map(str, MINIMUM_TORCH))
                raise BuildError(f"torch {version} in {folder} is too old: install torch>={needed}")
            return Path(folder), version
    raise BuildError(
        f"no torch found for {sys.executable}: install torch first (it is never downloaded by the "
        "build), or pass --no-build-isolation to build with the torch of this environment"
    )


def find_pybind11(torch_dir: Path) -> Path:
    """Include folder of pybind11; torch carries a copy for environments that lack the package."""
    try:
        import pybind11
    except ImportError:
        return torch_dir / "include"
    return Path(pybind11.get_include())


def find_tool(name: str) -> str | None:
    """The tool beside this interpreter (its venv need not be activated), else the one on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def run(command: list[str]) -> None:
    """Run with its output shown; a failure carries the first error and the three lines after it."""
    print("+", *command, flush=True)
    output = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            output.append(line.strip())
    if process.returncode:
        after_error = dropwhile(lambda line: "error" not in line.lower(), filter(None, output))
        raise BuildError(
            f"{Path(command[0]).name} exited with {process.returncode}: "
            + " ".join(islice(after_error, 4))
        )


class CMakeExtension(Extension):
    """One library, built by the CMake target of the same name.

    One extension per library, so that an editable install copies each of them.
    """

    def __init__(self, library: str, *, optional: bool) -> None:
        super().__init__(f"{PACKAGE}.{library}", sources=[], optional=optional)
        self.library = library


class CMakeBuild(build_ext):
    """Builds the extensions with CMake and leaves a report of it in the package."""

    def run(self) -> None:
        # Copy always: a library in the tree may be newer, but of another torch or Python.
        self.force = True
        self.problems: dict[str, str | None] = dict.fromkeys(
            ALL_LIBRARIES, f"not asked for (MIMNET_FAST_BUILD={MODE})"
        )
        self.facts: dict[str, object] = {}
        in_place = self.inplace
        super().run()
        self.write_report(Path(PACKAGE) if in_place else Path(self.build_lib, PACKAGE))
        for library, problem in self.problems.items():
            if problem and in_place:
                Path(self.get_ext_filename(f"{PACKAGE}.{library}")).unlink(missing_ok=True)

    def build_extension(self, ext: CMakeExtension) -> None:
        if ext.library == "_C_cuda" and MODE == "auto" and not self.cuda_is_wanted():
            return
        try:
            build_dir = self.configured_build_dir
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.environ.get("MAX_JOBS")
            options = ["--target", ext.library, "--parallel", jobs or str(os.cpu_count() or 1)]
            run([self.cmake, "--build", str(build_dir), *options])
        except BuildError as error:
            self.problems[ext.library] = str(error)
            if ext.optional:
                print(
                    f"\n*** mimnet_fast: the native library {ext.library} IS LEFT OUT, see below.\n"
                    "*** The package works without it, but more slowly.\n"
                    "*** MIMNET_FAST_BUILD=cpu makes this an error.\n",
                    file=sys.stderr,
                )
            raise
        self.problems[ext.library] = None
        self.facts.update(json.loads((build_dir / "build_info.json").read_text()))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(build_dir / "lib" / target.name), str(target))

    @cached_property
    def configured_build_dir(self) -> Path:
        """Build folder kept between installs, so that only what changed is compiled again."""
        torch_dir, torch_version = self.torch
        self.facts["torch"] = torch_version
        cuda = []
        if MODE == "cuda" or (MODE == "auto" and self.cuda_is_wanted()):
            self.facts["cuda_architectures"] = architectures = cuda_architectures()
            cuda = [f"-DCMAKE_CUDA_ARCHITECTURES={cmake_architectures(architectures)}"]
        ninja = find_tool("ninja")
        generator = "ninja" if ninja else "make"
        build_dir = ROOT / "build" / f"{sys.implementation.cache_tag}-{generator}"
        cache = build_dir / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(build_dir)  # the tree was moved, which CMake refuses
        run(
            [
                self.cmake,
                *("-S", str(ROOT), "-B", str(build_dir)),
                *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
                "-DCMAKE_BUILD_TYPE=Release",
                f"-DMIMNET_FAST_VERSION={self.distribution.get_version()}",
                f"-DTORCH_DIR={torch_dir}",
                f"-DPYBIND11_INCLUDE_DIR={find_pybind11(torch_dir)}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DMIMNET_FAST_CUDA={'ON' if cuda else 'OFF'}",
                *cuda,
            ]
        )
        return build_dir

    @cached_property
    def torch(self) -> tuple[Path, str]:
        return find_torch()

    def cuda_is_wanted(self) -> bool:
        """Whether a build that was not asked for CUDA has a use for it."""
        try:
            has_cuda = any(self.torch[0].glob("lib/libtorch_cuda*"))
        except BuildError:  # which the other libraries report
            return False
        if has_cuda and shutil.which("nvcc"):
            return True
        missing = "nvcc is not on PATH" if has_cuda else "this torch is a CPU build"
        self.problems["_C_cuda"] = f"not built: {missing} (MIMNET_FAST_BUILD=cuda insists)"
        return False

    @property
    def cmake(self) -> str:
        cmake = find_tool("cmake")
        if cmake is None:
            raise BuildError("cmake not found: run `pip install cmake ninja`")
        return cmake

    def get_ext_filename(self, fullname: str) -> str:
        parts = fullname.split(".")
        if parts[-1].startswith("_C"):  # for torch.ops.load_library: no Python module, so no tag
            return os.path.join(*parts) + ".so"
        return super().get_ext_filename(fullname)

    def write_report(self, folder: Path) -> None:
        report = {
            "version": self.distribution.get_version(),
            "mode": MODE,
            "libraries": {name: problem or "built" for name, problem in self.problems.items()},
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            **self.facts,
        }
        (folder / "_build_info.json").write_text(json.dumps(report, indent=2) + "\n")


class Build(build):
    """Always writes the build report, and packs no file that an earlier build left behind."""

    sub_commands: ClassVar = [
        (name, None if name == "build_ext" else condition) for name, condition in build.sub_commands
    ]

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, PACKAGE), ignore_errors=True)
        super().run()


MODE = build_mode()

# Never installed at the top level, where other packages have these names.
package_dir = {f"{PACKAGE}.{folder}": folder for folder in ("bench", "kernels")}

setup(
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), *package_dir],
    package_dir=package_dir,
    ext_modules=[
        CMakeExtension(library, optional=MODE == "auto") for library in LIBRARIES_OF_MODE[MODE]
    ],
    cmdclass={"build": Build, "build_ext": CMakeBuild},
)
