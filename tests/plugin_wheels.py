"""Tiny plug-ins as real wheels, and folders that they are installed into with pip."""

import base64
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

SOURCE = """
class Step:
    row_wise = {row_wise}

    def __init__(self, spec, amount):
        self.inputs = self.outputs = (spec,)
        self.amount = amount

    def apply(self, arrays):
        {body}


def open_step(parameters, inputs):
    return Step(inputs[0], parameters.get("amount", 0))
"""
ADD = "return {name: array + array.dtype.type(self.amount) for name, array in arrays.items()}"


def make_wheel(
    folder: Path,
    *,
    name: str = "acme-add",
    version: str = "1.0",
    body: str = ADD,
    row_wise: bool = False,
    top: str = "",
) -> Path:
    """A wheel with the plug-in `acme.add`: `body` is what its step does with `arrays`, `top` runs on import."""
    package, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{package}/__init__.py": "",
        f"{package}/steps.py": top + SOURCE.format(body=body, row_wise=row_wise),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[edgeferry.pipelines]\nacme.add = {package}.steps:open_step\n",
    }
    record = "".join(f"{path},sha256={_hash(text)},{len(text.encode())}\n" for path, text in files.items())
    wheel = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(path, text)
    return wheel


def install(wheel: Path, target: Path) -> None:
    """pip install it into the folder `target`."""
    command = ["install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--upgrade", "--target"]
    subprocess.run([sys.executable, "-m", "pip", *command, str(target), str(wheel)], check=True)


def unpack(wheel: Path, target: Path) -> None:
    """What installing a wheel of plain Python comes to, faster: its files, and the RECORD that it brings."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)


def _hash(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
