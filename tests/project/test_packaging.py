"""What a wheel holds, and what an installation does to Python processes. All in copies of the checkout."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from nnunetv2_mgml import __version__

REPOSITORY = Path(__file__).parents[2]
PTH = "nnunetv2_mgml.pth"
OPTIONAL = ("mamba_ssm", "openvino", "panoptica")
SHIPPED = [
    "setup.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CITATION.cff",
    PTH,
    "Makefile",
    "nnunetv2_mgml",
    "dataset_conversion",
    "tests",
]
REPORT = """
import os, sys
print(os.environ.get("nnUNet_extTrainer"))
print("nnunetv2_mgml" in sys.modules)
"""


def call(*command: object, folder: Path | None = None, quiet: bool = False, **environment: str) -> str:
    """Run a command and return what it printed; ``quiet``: its error stream must stay empty."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "nnUNet_extTrainer")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env={**inherited, **environment},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not quiet or done.stderr == ""
    return done.stdout


class Environment:
    """A fresh virtual environment that borrows the packages of the running one, but not their .pth files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        call(sys.executable, "-m", "venv", "--without-pip", folder)
        self.bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.python = self.bin / "python"
        self.site = Path(call(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        (self.site / "_borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def pip(self, *arguments: object) -> str:
        return call(sys.executable, "-m", "pip", "--python", self.python, *arguments)

    def run(self, script: str, code: str, *arguments: str, **environment: str) -> list[str]:
        """Run code as a script of this name; its error stream must stay empty."""
        file = self.folder / script
        file.write_text(code)
        return call(self.python, file, *arguments, folder=self.folder, quiet=True, **environment).splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build sees, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SHIPPED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist built from the checkout: what is missing in MANIFEST.in is missing here."""
    folder = tmp_path_factory.mktemp("wheel")
    call(
        sys.executable,
        "-c",
        f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})",
        folder=checkout,
    )
    [sdist] = folder.glob("*.tar.gz")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", folder, sdist)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, checkout, wheel, tmp_path_factory) -> tuple[Environment, Path]:
    """An environment with the project in it, and the ext folder its trainers are found in."""
    environment = Environment(tmp_path_factory.mktemp(request.param))
    if request.param == "wheel":
        environment.pip("install", "--no-deps", wheel)
        return environment, environment.site / "nnunetv2_mgml" / "ext"
    environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", checkout)
    return environment, checkout / "nnunetv2_mgml" / "ext"


def test_wheel_contents(wheel, checkout):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        information = f"nnunetv2_mgml-{__version__}.dist-info"
        record = archive.read(f"{information}/RECORD").decode()
        metadata = archive.read(f"{information}/METADATA").decode()
        assert archive.read(PTH).decode() == (REPOSITORY / PTH).read_text()
    assert {name.split("/")[0] for name in names} == {"nnunetv2_mgml", information, PTH}
    assert f"{PTH},sha256=" in record
    assert "Requires-Dist: nnunetv2<2.9,>=2.8.1" in metadata
    assert "Requires-Python: >=3.10" in metadata
    packaged = {name for name in names if name.startswith("nnunetv2_mgml/")}
    expected = {path.relative_to(checkout) for path in (checkout / "nnunetv2_mgml").rglob("*") if path.is_file()}
    expected |= {
        "nnunetv2_mgml" / path.relative_to(checkout)
        for path in (checkout / "dataset_conversion").rglob("*")
        if path.is_file()
    }
    assert packaged == {path.as_posix() for path in expected}


def test_every_package_that_is_imported_is_required():
    imported = set()
    for file in (*REPOSITORY.glob("nnunetv2_mgml/**/*.py"), *REPOSITORY.glob("dataset_conversion/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    names = imported - set(sys.stdlib_module_names) - {"nnunetv2_mgml", *OPTIONAL}
    owners = packages_distributions()
    needed = {owners[name][0].lower().replace("_", "-") for name in names}
    required = re.search(r"install_requires=\[(.+?)^        \]", (REPOSITORY / "setup.py").read_text(), re.M | re.S)[1]
    assert {"nibabel", "torch"} < needed
    assert needed <= {name.lower() for name in re.findall(r'^ *"([\w-]+)', required, re.M)}


def test_start_up_line_is_one_line_of_ascii():
    text = (REPOSITORY / PTH).read_bytes().decode("ascii")
    assert text.count("\n") == 1
    assert text.startswith("import ")


def test_the_container_runs_as_any_user() -> None:
    """With ``docker run --user`` there is no entry in /etc/passwd, which name and home would be looked up in."""
    lines = (REPOSITORY / "containers" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    words = [word for line in lines if line.startswith("ENV ") for word in line.split()[1:]]
    environment = dict(word.split("=", 1) for word in words)
    script = (
        "import getpass, os, pwd; from pathlib import Path; pwd.getpwuid = None; "
        "print(getpass.getuser(), Path.home(), os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    )
    command = [sys.executable, "-I", "-c", script]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert printed.split() == ["user", "/tmp", "/tmp/torchinductor"]


def test_setup_py_does_nothing_when_imported():
    """nnU-Net imports every module of a folder that nnUNet_extTrainer names, even of this one."""
    code = "import sys; sys.argv = ['nnUNetv2_train', '500']; import setup; print('setuptools' in sys.modules)"
    assert call(sys.executable, "-c", code, folder=REPOSITORY) == "False\n"


def test_nothing_generic_is_importable(installed):
    environment, ext = installed
    code = """
import importlib.util, nnunetv2_mgml, nnunetv2_mgml.dataset_conversion
print([name for name in ("tests", "dataset_conversion", "setup", "conftest") if importlib.util.find_spec(name)])
print(nnunetv2_mgml.__file__)
"""
    assert environment.run("train.py", code) == ["[]", str(ext.parent / "__init__.py")]


@pytest.mark.parametrize(
    "script", ["nnUNetv2_train", "nnUNetv2_predict", "nnUNetv2_train.exe", "nnUNetv2_plan_and_preprocess-script.py"]
)
def test_commands_of_nnunet_find_the_folder(installed, script):
    environment, ext = installed
    assert environment.run(script, REPORT) == [str(ext), "True"]


@pytest.mark.parametrize("script", ["train.py", "my_nnUNetv2_train", "nnUNet_train", "mgml_like"])
def test_other_scripts_are_left_alone(installed, script):
    environment, _ = installed
    assert environment.run(script, REPORT) == ["None", "False"]


def test_other_processes_are_left_alone(installed):
    environment, _ = installed
    assert call(environment.python, "-c", REPORT, "nnUNetv2_train").split() == ["None", "False"]
    module = environment.folder / "nnUNetv2_module.py"
    module.write_text(REPORT)
    assert call(environment.python, "-m", "nnUNetv2_module", folder=environment.folder).split() == ["None", "False"]
    imported = subprocess.run(
        [environment.python, "-X", "importtime", "-c", ""], capture_output=True, text=True, check=True
    ).stderr
    assert "site" in imported
    assert "mgml" not in imported
    assert "pathlib" not in imported  # what setuptools' own finder for editable installs would cost


def test_it_can_be_switched_off(installed):
    environment, ext = installed
    assert environment.run("nnUNetv2_train", REPORT, NNUNETV2_MGML_DISABLE="1") == ["None", "False"]
    assert environment.run("nnUNetv2_train", REPORT, NNUNETV2_MGML_DISABLE="0") == [str(ext), "True"]


def test_the_users_own_folders_stay_first(installed):
    environment, ext = installed
    both = f"/mine{os.pathsep}{ext}"
    assert environment.run("nnUNetv2_train", REPORT, nnUNet_extTrainer="/mine")[0] == both
    assert environment.run("nnUNetv2_train", REPORT, nnUNet_extTrainer=both)[0] == both


def test_spawned_children_inherit_it(installed):
    environment, ext = installed
    code = """
import multiprocessing, os
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(os.getenv, ("nnUNet_extTrainer",)))
"""
    assert environment.run("nnUNetv2_train", code) == [str(ext)]


@pytest.mark.slow
def test_nnunet_finds_the_trainer(installed):
    environment, ext = installed
    code = """
import pickle
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
trainer = find("nnUNetTrainerMGML")
assert find("nnUNetTrainerMGML") is trainer is pickle.loads(pickle.dumps(trainer))
print(trainer.__module__)
"""
    printed = environment.run("nnUNetv2_train", code, PYTHONWARNINGS="ignore")
    assert f"Using trainer 'nnUNetTrainerMGML' from: {ext}" in printed
    assert printed[-1] == "nnunetv2_mgml.training.trainer"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["predict", "predict_from_modelfolder"])
def test_help_of_the_predict_commands_shows_our_flag(installed, command):
    environment, _ = installed
    entry_point = "predict_entry_point" + "_modelfolder" * command.endswith("folder")
    code = (
        f"import sys\nfrom nnunetv2.inference.predict_from_raw_data import {entry_point}\n"
        f"if __name__ == '__main__':\n    sys.exit({entry_point}())\n"
    )
    printed = "\n".join(environment.run(f"nnUNetv2_{command}", code, "-h", PYTHONWARNINGS="ignore"))
    assert f"usage: nnUNetv2_{command}" in printed
    assert "--missing_modalities" in printed
    assert "--disable_tta" in printed


def test_mgml_command(installed):
    environment, ext = installed
    assert call(environment.bin / "mgml", "info", "--ext-dir", quiet=True).strip() == str(ext)
    information = call(environment.bin / "mgml", "info", quiet=True)
    assert "on: nnUNetv2_* commands find the trainers by themselves" in information


def test_half_removed_and_uninstalled(wheel, tmp_path):
    environment = Environment(tmp_path / "env")
    environment.pip("install", "--no-deps", wheel)
    (environment.site / "nnunetv2_mgml" / "upstream" / "registration.py").unlink()
    shutil.rmtree(environment.site / "nnunetv2_mgml" / "__pycache__")
    assert environment.run("nnUNetv2_train", REPORT)[0] == "None"
    shutil.rmtree(environment.site / "nnunetv2_mgml" / "upstream")
    (environment.site / "nnunetv2_mgml" / "_moved.py").unlink()
    assert environment.run("nnUNetv2_train", REPORT)[0] == "None"
    shutil.rmtree(environment.site / "nnunetv2_mgml")
    assert environment.run("nnUNetv2_train", REPORT) == ["None", "False"]
    environment.pip("install", "--no-deps", "--force-reinstall", wheel)
    environment.pip("uninstall", "--yes", "nnunetv2-mgml")
    assert [path.name for path in environment.site.rglob("*mgml*")] == []


def test_a_moved_checkout_and_uninstalling_it(checkout, tmp_path):
    copy = shutil.copytree(checkout, tmp_path / "checkout")
    environment = Environment(tmp_path / "env")
    environment.pip("install", "--no-deps", "--no-build-isolation", "--editable", copy)
    assert environment.run("nnUNetv2_train", REPORT) == [str(copy / "nnunetv2_mgml" / "ext"), "True"]
    copy.rename(tmp_path / "elsewhere")
    assert environment.run("nnUNetv2_train", REPORT) == ["None", "False"]
    environment.pip("uninstall", "--yes", "nnunetv2-mgml")
    assert [path.name for path in environment.site.rglob("*mgml*")] == []
