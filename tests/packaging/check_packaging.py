"""What `make check-packaging` asks: that s2w can be installed, and works where it is installed.

Resolving needs the package index, metadata only. Not named test_*.py, so that the tests themselves stay offline.
"""

from __future__ import annotations

import ast
import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from example_run import write_run

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
UV = Path(sysconfig.get_path("scripts")) / "uv"
PYTHONS = [line.rsplit(" ", 1)[1] for line in PROJECT["project"]["classifiers"] if "Python :: 3." in line]
LOCKS = ("cpu", "gpu")


def run(*command: str | Path, cwd: Path, environment: dict[str, str] | None = None) -> str:
    """Its stdout; fails with all that it printed."""
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}", pytrace=False)
    return result.stdout


def locked(lock: str) -> dict[str, str]:
    """Versions by package of locks/LOCK.txt."""
    return pins((ROOT / "locks" / f"{lock}.txt").read_text())


def pins(text: str) -> dict[str, str]:
    """Versions by package, without the local part (+cpu), which the package index does not have."""
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, re.MULTILINE))


def resolve(lock: str, python: str, directory: Path) -> dict[str, str]:
    """What pyproject.toml resolves to where only the lock's versions may be taken: metadata, no downloads."""
    constraints = directory / f"{lock}-{python}.txt"
    constraints.write_text("".join(f"{package}=={version}\n" for package, version in locked(lock).items()))
    options = ("--quiet", "--python-version", python, "--constraint", constraints)
    return pins(run(UV, "pip", "compile", *options, "--config-file", f"locks/{lock}.toml", "pyproject.toml", cwd=ROOT))


@pytest.fixture(scope="module")
def resolutions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], Future[dict[str, str]]]]:
    """All of them at once: most of the time they wait for the package index."""
    directory = tmp_path_factory.mktemp("resolutions")
    with ThreadPoolExecutor() as pool:
        yield {key: pool.submit(resolve, *key, directory) for key in itertools.product(LOCKS, PYTHONS)}


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", LOCKS)
def test_lock_is_what_pyproject_resolves_to(
    lock: str, python: str, resolutions: dict[tuple[str, str], Future[dict[str, str]]]
) -> None:
    assert resolutions[lock, python].result() == locked(lock), "`make lock` makes the locks anew"


def test_cpu_lock_knows_what_torch_requires() -> None:
    metadata = tomllib.loads((ROOT / "locks" / "cpu.toml").read_text())["dependency-metadata"]
    torch = next(entry for entry in metadata if entry["name"] == "torch")
    installed = importlib.metadata.distribution("torch")
    assert torch["version"] == installed.version.partition("+")[0]
    assert torch["requires-dist"] == sorted(line for line in installed.requires or () if "extra ==" not in line)


def undeclared(files: Iterable[Path], requirements: Iterable[str], own: set[str]) -> set[str]:
    """The modules that files import and no requirement brings; `own` are modules of the project."""
    declared = {_normalised(re.match(r"[\w.-]+", requirement).group()) for requirement in requirements}  # type: ignore[union-attr]
    brings = importlib.metadata.packages_distributions()
    imported: set[str] = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    return {
        module
        for module in imported - sys.stdlib_module_names - own
        if not declared & {_normalised(package) for package in (module, *brings.get(module, ()))}
    }


def _normalised(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_every_import_is_declared(tmp_path: Path) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    for_users = [
        *PROJECT["project"]["dependencies"],
        *(line for name in set(extras) - {"dev"} for line in extras[name]),
    ]
    for_developers = [*for_users, *extras["dev"], *PROJECT["dependency-groups"]["peers"]]
    package = list((ROOT / "s2w").rglob("*.py"))
    beside = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert undeclared(package, for_users, {"s2w"}) == set()
    assert undeclared(beside, for_developers, {"s2w", *(file.stem for file in beside)}) == set()

    careless = tmp_path / "careless.py"
    careless.write_text("def later():\n    import aiohttp.web, numpy\n")
    assert undeclared([careless], for_users, set()) == {"aiohttp"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which is built from the files that git knows: leftovers here add nothing."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    options = ("--quiet", "--python", sys.executable, "--no-build-isolation", "--out-dir", directory)
    run(UV, "build", *options, source, cwd=directory)
    return next(directory.glob("*.whl"))


def tracked(*where: str) -> list[str]:
    """The checkout's files, new ones too."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *where, cwd=ROOT)
    return sorted({name for name in listing.split("\0") if name and (ROOT / name).exists()})


def test_wheel_has_every_file(wheel: Path) -> None:
    expected = {name if name.startswith("s2w/") else f"s2w/{name}" for name in tracked("s2w", "configs")}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    missing, surplus = sorted(expected - packed), sorted(packed - expected)
    assert not missing and not surplus, "packages and package-data of pyproject.toml"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that has the wheel, and this one's other packages behind it."""
    environment = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    run(UV, "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python, wheel, cwd=environment)
    packages = sysconfig.get_path("purelib", vars={"base": str(environment)})
    # Editable installs are .pth files themselves, which Python does not follow from here.
    (Path(packages) / "behind.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def elsewhere() -> dict[str, str]:
    """The environment without this checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


EVERY_MODULE = """
import importlib.metadata, pkgutil, s2w
for module in pkgutil.walk_packages(s2w.__path__, "s2w."):
    importlib.import_module(module.name)
plugin, = [point for point in importlib.metadata.entry_points(group="vllm.general_plugins") if point.name == "s2w"]
print(s2w.__file__, plugin.load().__module__)
"""


def test_every_module_imports_where_installed(installed: Path, tmp_path: Path) -> None:
    printed = run(installed / "python", "-c", EVERY_MODULE, cwd=tmp_path, environment=elsewhere())
    place, plugin = printed.splitlines()[-1].split()
    assert Path(place).is_relative_to(installed.parent)
    assert plugin == "s2w.vllm_plugin"


def test_commands_work_where_installed(installed: Path, tmp_path: Path) -> None:
    def s2w(*arguments: str) -> str:
        return run(installed / "s2w", *arguments, cwd=tmp_path, environment=elsewhere())

    testbed = re.search(r"^  model: (.*)$", s2w("train", "--cfg", "experiment=testbed"), re.MULTILINE)
    assert testbed and Path(testbed[1]).is_relative_to(installed.parent)
    assert "experiment=" in s2w("train", "--help")
    write_run(tmp_path / "run")
    page = Path(s2w("report", str(tmp_path / "run")).strip())
    assert page == tmp_path / "run" / "report" / "index.html"
    assert "</html>" in page.read_text()
