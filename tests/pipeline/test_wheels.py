"""The wheels hold the configuration that the repository links into the packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["tokenizer", "ar", "eval"])
def test_a_wheel_holds_its_configuration_and_types(package: str, tmp_path: Path) -> None:
    """Built as a release is: the source distribution first, the wheel from that."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path)]
    source = REPOSITORY / "packages" / package
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
        conf = REPOSITORY / "conf" / package
        for file in conf.rglob("*.yaml"):
            name = f"{package}/conf/{file.relative_to(conf)}"
            assert archive.read(name) == file.read_bytes()
    modules = {
        str(path.relative_to(source / "src"))
        for path in (source / "src").rglob("*")
        if path.suffix in (".py", ".typed", ".css", ".js") and "conf" not in path.parts
    }
    assert modules <= packed
