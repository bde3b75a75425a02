"""What is built for users: the wheel works where there is PyTorch alone, and the source distribution is complete."""

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE = Path(sysconfig.get_path("purelib"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the source distribution; a warning while they are built is an error."""
    folder = tmp_path_factory.mktemp("built")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout.split(b"\0")
    files = [Path(name.decode()) for name in tracked if name] or [p.relative_to(ROOT) for p in ROOT.rglob("*")]
    for file in files:  # in a copy, since a build leaves folders behind
        if (ROOT / file).is_file() and ".venv" not in file.parts:
            (folder / "copy" / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / file).write_bytes((ROOT / file).read_bytes())
    command = [sys.executable, "-W", "error", "-m", "build", "--no-isolation", "--outdir", folder, folder / "copy"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


def requirements(name, found):
    """Installed distributions that one needs, without extras, and itself."""
    if name not in found:
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            return
        for line in found[name].requires or []:
            if "extra ==" not in line:
                requirements(re.match(r"[\w.-]+", line).group().lower(), found)


def environment(folder):
    """A folder with links to PyTorch, NumPy (without which PyTorch warns) and what they need, and nothing else."""
    folder.mkdir()
    found = {}
    for name in ("torch", "numpy"):
        requirements(name, found)
    for one in found.values():
        for top in {file.parts[0] for file in one.files if file.parts[0] not in ("..", "__pycache__")}:
            (folder / top).symlink_to(SITE / top)
    return folder


def test_the_wheel_runs_the_example_of_the_readme_where_there_is_only_pytorch(built, tmp_path):
    only_pytorch = environment(tmp_path / "only_pytorch")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(only_pytorch)
    text = (ROOT / "README.md").read_text()
    code = "import sys; sys.path.insert(0, sys.argv[1])\n" + re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    code += "import backpack\nprint(backpack.__file__)\n"
    command = [sys.executable, "-S", "-I", "-W", "error", "-c", code, only_pytorch]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    *printed, file = done.stdout.splitlines()
    assert Path(file).is_relative_to(only_pytorch)
    assert "\n".join(printed) == re.search(r"```text\n(.*?)\n```", text, re.DOTALL).group(1)


def test_the_source_distribution_has_all_files_of_the_repository(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        packed = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    files = {p.relative_to(built / "copy") for p in (built / "copy").rglob("*") if p.is_file()}
    missing = {file for file in files if file.name != ".gitignore" and file not in packed}
    assert not {f for f in missing if "egg-info" not in str(f) and f.parts[0] not in ("build", "dist")}
    assert {Path("Makefile"), Path("tests/conftest.py"), Path("examples/first_steps/subsampling.py")} <= packed
