"""The package builds, installs and loads in every way that users install it.

The tests marked `packaging` install into fresh virtual environments, which see the packages of the
running one through a .pth file, so that torch is not installed again. They need the package index.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import mimnet_fast

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(mimnet_fast.__file__).with_name("_C.so")

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason=f"{LIBRARY} is not built")
needs_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="binutils not installed")
packaging = [pytest.mark.packaging, pytest.mark.slow]


def run(*command, cwd=None, fails=False, **environment):
    """Output of a command that must succeed, or with `fails` must not."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("MIMNET_FAST_", "PYTHON"))}
    # `make` puts no environment on PATH, but a build without isolation needs its cmake and ninja.
    outer["PATH"] = sysconfig.get_path("scripts") + os.pathsep + outer["PATH"]
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**outer, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (process.returncode != 0) == fails, process.stdout
    return process.stdout


# What the library may use of torch


@needs_library
@needs_binutils
def test_library_uses_only_the_stable_abi_of_torch():
    symbols = run("nm", "-D", "-C", "--undefined-only", LIBRARY).splitlines()
    assert any(" aoti_torch_" in symbol for symbol in symbols)
    assert [s for s in symbols if re.search(r"\b(at|c10|caffe2|torch)::", s)] == []


def test_sources_include_only_stable_headers():
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/shim.h")
    include = re.compile(r'^\s*#\s*include\s*[<"]((?:torch|ATen|c10|caffe2)/[^>"]+)', re.M)
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    found = {header for path in sources for header in include.findall(path.read_text())}
    assert found, "the sources include no torch header at all: is the pattern still right?"
    assert [header for header in sorted(found) if not header.startswith(allowed)] == []


@needs_library
@needs_binutils
@pytest.mark.skipif(shutil.which("objdump") is None, reason="binutils not installed")
def test_wide_instructions_stay_in_their_variant():
    """An inline function merged across variants must not be the copy that few CPUs can run."""
    function, wide = "", set()
    for line in run("objdump", "--disassemble", "--no-show-raw-insn", LIBRARY).splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2].removesuffix(">:")
        elif re.search(r"%[yz]mm\d", line):
            wide.add(function)
    if not wide:
        pytest.skip("this architecture has no variants")
    # Clones that GCC specialises (.isra, .constprop, .part) belong to one object: not merged.
    own = re.compile(r"avx2|avx512|\.(isra|constprop|part)\.")
    assert [name for name in sorted(wide) if not own.search(name)] == []


# Ways to install


class Environment:
    """A fresh virtual environment that sees the packages of the running one."""

    def __init__(self, folder):
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.python = folder / "bin" / "python"
        (self.site_packages,) = folder.glob("lib/python*/site-packages")
        (self.site_packages / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments, **options):
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", self.python]
        return run(*pip, *arguments, **options)

    def describe(self, cwd):
        """The info report, and what only a running interpreter can tell, seen from `cwd`."""
        report = json.loads(run(self.python, "-m", "mimnet_fast.info", "--json", cwd=cwd))
        probe = (
            "import importlib.util, os, torch; from mimnet_fast import ops; x = torch.rand(3, 5);"
            "y = {b: ops.squash(x, backend=b) for b in ('reference', BACKEND)};"
            "torch.testing.assert_close(y[BACKEND], y['reference']);"
            # Nothing installs top-level packages of these names; a source tree in the way has some.
            "found = {n: importlib.util.find_spec(n) for n in ('bench', 'kernels')};"
            "assert all(not f or f.origin == os.path.abspath(n + '/__init__.py')"
            " for n, f in found.items())"
        )
        loaded = report["libraries"]["_C"] == "loaded"
        run(
            self.python,
            "-c",
            probe.replace("BACKEND", repr("native" if loaded else "reference")),
            cwd=cwd,
        )
        return report


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    (archive,) = folder.glob("mimnet_fast-*.tar.gz")
    return archive


def unpack(archive, folder):
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def tree(sdist, tmp_path_factory):
    """The source tree as the sdist holds it; its build folder is shared by the tests."""
    return unpack(sdist, tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    return Environment(tmp_path_factory.mktemp("builder") / "env")


@pytest.fixture(scope="module")
def wheel(builder, tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    arguments = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder, tree)
    builder.pip("wheel", *arguments, MIMNET_FAST_BUILD="cpu")
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def environment(tmp_path):
    return Environment(tmp_path / "env")


class TestInstall:
    pytestmark = packaging

    def check_native(self, environment, cwd):
        report = environment.describe(cwd)
        assert report["libraries"]["_C"] == "loaded"
        assert report["build"]["libraries"]["_host"] == "built"
        assert report["machine"]["kernel variant"] in report["build"]["isa_variants"]
        assert report["package"]["warning"] is None
        assert not (environment.site_packages / "torch").exists(), "torch was installed again"
        return Path(report["package"]["location"])

    def test_wheel(self, environment, wheel, tmp_path):
        assert "-none-any" not in wheel.name
        environment.pip("install", wheel)
        location = self.check_native(environment, tmp_path)
        assert location == environment.site_packages / "mimnet_fast"
        command = environment.folder / "bin" / "mimnet-fast"
        assert "mimnet-fast" in run(command, "--help")
        # Inside a repository, which is not the one that the package comes from.
        run("git", "init", tmp_path)
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        run("git", *author, "commit", "--allow-empty", "--message", "theirs", cwd=tmp_path)
        few = ("--ops", "squash", "--cases", "paper", "--modes", "--seconds", "0.01")
        assert "(unknown)" in run(command, "bench", *few, cwd=tmp_path)
        (result,) = tmp_path.glob("bench-results/*.json")
        assert {each.suffix for each in result.parent.iterdir()} == {".json", ".md", ".svg"}
        timed = json.loads(result.read_text())["results"][1]["contenders"]["mimnet_fast"]
        assert timed["peak_bytes"] > 0

    @pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "non-isolated"])
    @pytest.mark.parametrize("editable", [True, False], ids=["editable", "copied"])
    def test_source_tree(self, environment, tree, tmp_path, editable, isolation):
        options = [*(["--editable"] if editable else []), tree]
        options += [] if isolation else ["--no-build-isolation"]
        environment.pip("install", *options, MIMNET_FAST_BUILD="cpu")
        location = self.check_native(environment, tmp_path)
        assert location == (tree if editable else environment.site_packages) / "mimnet_fast"
        if editable:  # which finds the folders beside the package by a map
            run(environment.python, "-c", "import mimnet_fast.bench.report", cwd=tmp_path)

    def test_sdist_without_native_code(self, environment, sdist, tmp_path):
        environment.pip("install", "--no-build-isolation", sdist, MIMNET_FAST_BUILD="none")
        report = environment.describe(tmp_path)
        assert report["libraries"]["_C"] != "loaded"
        assert "MIMNET_FAST_BUILD=none" in report["build"]["libraries"]["_C"]
        assert list(environment.site_packages.rglob("mimnet_fast/*.so")) == []
        assert report["backends"]["cpu"]["reference"] == "available"

    def test_none_takes_stale_libraries_out_of_an_editable_tree(self, environment, sdist, tmp_path):
        tree = unpack(sdist, tmp_path / "tree")
        (tree / "mimnet_fast" / "_C.so").write_bytes(b"of an earlier build")
        options = ("--no-build-isolation", "--editable", tree)
        environment.pip("install", *options, MIMNET_FAST_BUILD="none")
        assert not (tree / "mimnet_fast" / "_C.so").exists()

    def test_broken_compiler_leaves_a_working_package(self, environment, sdist, tmp_path):
        tree = unpack(sdist, tmp_path / "tree")
        options = ("--verbose", "--no-build-isolation", tree)
        output = environment.pip("install", *options, CXX=shutil.which("false"))
        assert "native library _C IS LEFT OUT" in output
        report = environment.describe(tmp_path)
        assert report["build"]["mode"] == "auto"
        assert "compiler" in report["build"]["libraries"]["_C"]
        environment.pip(
            "install", *options, CXX=shutil.which("false"), MIMNET_FAST_BUILD="cpu", fails=True
        )

    def test_unchanged_tree_is_not_compiled_again(self, builder, tree, wheel, tmp_path):
        arguments = ("--verbose", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path)
        output = builder.pip("wheel", *arguments, tree, MIMNET_FAST_BUILD="cpu")
        assert "no work to do" in output
        assert "Building CXX object" not in output

    @pytest.mark.parametrize(
        ("mode", "message"),
        [
            ("bogus", "got 'bogus', need one of auto, none, cpu, cuda"),
            ("cuda", "nvcc is not on PATH"),
        ],
    )
    def test_impossible_build_says_why(self, environment, tree, tmp_path, mode, message):
        options = ("--no-deps", "--no-build-isolation", tree)
        found = environment.pip(
            "install", *options, MIMNET_FAST_BUILD=mode, PATH=str(tmp_path), fails=True
        )
        assert message in found

    def test_source_tree_that_hides_the_wheel(self, environment, sdist, wheel, tmp_path):
        environment.pip("install", "--no-deps", wheel)
        tree = unpack(sdist, tmp_path / "tree")
        report = environment.describe(tree)
        assert str(environment.site_packages / "mimnet_fast") in report["package"]["warning"]
        assert "_C.so" in report["libraries"]["_C"]
