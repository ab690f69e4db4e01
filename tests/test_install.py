"""Installation: what a build needs, which torch it is for, and what it produces."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from csrc import prerequisites
from tlkernels._core import native

ROOT = Path(__file__).resolve().parents[1]
SITE = Path(torch.__file__).parents[1]
HOOK = "from csrc import backend; backend.get_requires_for_build_wheel()"


def run(command, **options):
    """Run a command without the Python variables of pytest's environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= options.pop("environment", {})
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)


def one_line(text):
    """Assert that the text is one line, and return it."""
    assert text.endswith("\n"), text
    assert text.count("\n") == 1, text
    return text


@pytest.fixture
def environment(tmp_path):
    """An empty virtual environment: its Python, and the folder of its packages."""
    venv.create(tmp_path / "environment", symlinks=True)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    return tmp_path / "environment/bin/python", site


@pytest.fixture
def isolated(tmp_path):
    """A folder with setuptools alone, as pip's build isolation installs it."""
    folder = tmp_path / "isolated"
    folder.mkdir()
    for path in [SITE / "setuptools", SITE / "_distutils_hack", *SITE.glob("setuptools-*.dist-info")]:
        (folder / path.name).symlink_to(path)
    return folder


class TestWhatIsMissing:
    @pytest.mark.parametrize("version", ["none", "65.5.0"])
    def test_setuptools(self, environment, version):
        python, site = environment
        if version != "none":
            (site / "setuptools-65.5.0.dist-info").mkdir()
            (site / "setuptools-65.5.0.dist-info/METADATA").write_text("Name: setuptools\nVersion: 65.5.0\n")
        built = run([python, "-c", HOOK], cwd=ROOT)
        assert built.returncode == 1
        says = one_line(built.stderr)
        assert re.search(
            rf"expected setuptools>=77, got {version} in .*environment; run: pip install 'setuptools>=77'", says
        )

    def test_torch(self, environment, isolated):
        built = run([environment[0], "-c", HOOK], cwd=ROOT, environment={"PYTHONPATH": str(isolated)})
        assert built.returncode == 1
        says = one_line(built.stderr)
        assert (
            says.startswith("tlkernels: torch not found in ") and "environment; run: pip install 'torch>=2.11' " in says
        )
        assert "--no-build-isolation" in says
        assert "TLKERNELS_BUILD=0" in says

    @pytest.mark.parametrize(
        ("code", "says"),
        [
            ("__version__ = '2.10.1+cu130'", "expected torch>=2.11, got torch 2.10.1+cu130 in "),
            (
                "raise ImportError('libc10.so: not found')",
                "cannot be imported (libc10.so: not found); run: pip install --fo",
            ),
            ("__version__ = '2.11.0a0'", "C++ compiler not found (no-such-compiler): install one (apt: g++), or set"),
        ],
    )
    def test_torch_that_does_not_do_or_compiler(self, environment, isolated, code, says):
        python, site = environment
        (site / "torch").mkdir()
        (site / "torch/__init__.py").write_text(code)
        variables = {"PYTHONPATH": str(isolated), "CXX": "no-such-compiler"}
        built = run([python, "-c", HOOK], cwd=ROOT, environment=variables)
        assert built.returncode == 1
        assert says in one_line(built.stderr)

    def test_headers(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(SystemExit, match=r"Python\.h not found: .*apt: python3-dev.*TLKERNELS_BUILD=0"):
            prerequisites.check()


def test_an_isolated_build_takes_the_torch_of_the_environment(environment, isolated):
    python, site = environment
    (site / "torch.pth").write_text(f"{SITE}\n")
    code = """
import importlib.util, sys
assert importlib.util.find_spec("torch") is None
from csrc import prerequisites
prerequisites.check()
import torch, setuptools
print(torch.__version__, setuptools.__file__, sep="\\n")
"""
    # -S hides the environment's packages, as pip does.
    built = run([python, "-S", "-c", code], cwd=ROOT, environment={"PYTHONPATH": str(isolated)})
    assert built.stdout.splitlines() == [str(torch.__version__), str(isolated / "setuptools/__init__.py")], built.stderr


class TestImport:
    """What `import tlkernels` says of its extension, in a copy of the package."""

    CODE = """
import sys, torch, tlkernels as tlk
x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
expected = torch.nn.functional.cross_entropy(x, y)
for impl in sys.argv[1:]:
    torch.testing.assert_close(tlk.cross_entropy(x, y, impl=impl), expected)
try:
    tlk.cross_entropy(x, y, impl="native")
except NotImplementedError as error:
    print(error)
"""

    def imported(self, tmp_path, extension=None, impls=("auto",)):
        shutil.copytree(ROOT / "tlkernels", tmp_path / "tlkernels", ignore=shutil.ignore_patterns("*.so"))
        if extension is not None:
            (tmp_path / "tlkernels" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))).write_bytes(extension)
        done = run([sys.executable, "-c", self.CODE, *impls], cwd=tmp_path, environment={"TRITON_INTERPRET": "1"})
        assert done.returncode == 0, done.stderr
        return done

    def test_the_extension_says_which_torch_it_is_for(self, needs_native):
        assert native._torch_of(native.file()) == native.build_info()["torch"] == torch.__version__

    def test_another_torch(self, needs_native, tmp_path):
        note = b"\0tlkernels\0\0\0" + str(torch.__version__).encode() + b"\0"
        built = Path(native.file()).read_bytes()
        assert built.count(note) == 1
        done = self.imported(tmp_path, built.replace(note, note.replace(b"\0002.", b"\0001.")), ("reference", "triton"))
        other = f"1.{str(torch.__version__)[2:]}"
        for text in (one_line(done.stderr), done.stdout):
            assert f"it was built for torch {other}, this is torch {torch.__version__}" in text
            assert "run `pip install --force-reinstall --no-deps --no-cache-dir SOURCE`" in text

    def test_does_not_load(self, tmp_path):
        done = self.imported(tmp_path, b"\0tlkernels\0\0\0" + str(torch.__version__).encode() + b"\0")
        for text in (one_line(done.stderr), done.stdout):
            assert re.search(r"does not load \(.*(too short|ELF).*\); run `pip install", text)

    def test_does_not_say(self, tmp_path):
        assert "built for torch of unknown version, this is" in one_line(self.imported(tmp_path, b"").stderr)

    def test_without_one(self, tmp_path):
        """As after TLKERNELS_BUILD=0: nothing is said unless `native` is asked for."""
        done = self.imported(tmp_path)
        assert done.stderr == ""
        assert "does not load (none is installed for this Python); run `pip install" in done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "-d", folder]
    made = run(command, cwd=ROOT, environment={"TLKERNELS_BUILD": "0"})
    assert made.returncode == 0, made.stderr
    (path,) = folder.glob("*.tar.gz")
    return path


def ours(folder, *endings):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.suffix in endings}


def test_the_source_archive_has_what_a_build_needs(archive):
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert ours("csrc", ".py", ".cpp", ".h", ".inl", ".cu", ".cuh") | ours("tlkernels", ".py", ".typed") <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"} <= names
    assert not [name for name in names if re.match(r"tests|bench|scripts", name) or name.endswith((".so", ".pyc"))]


@pytest.fixture(scope="module")
def source(archive, tmp_path_factory):
    """The source archive, unpacked, with the objects of the checkout: those that fit are not compiled again."""
    unpacked = tmp_path_factory.mktemp("source")
    shutil.unpack_archive(archive, unpacked)
    (folder,) = unpacked.iterdir()
    for objects in ROOT.glob("build/temp.*/objects"):
        shutil.copytree(objects, folder / objects.relative_to(ROOT))
    return folder


def used(python, folder):
    """Compute a loss with an environment's tlkernels, and return the path of its native library."""
    code = """
import torch, tlkernels as tlk
from tlkernels._core import native
x, y = torch.randn(40, 50, requires_grad=True), torch.randint(50, (40,))
losses = [tlk.cross_entropy(x, y, impl="native"), torch.nn.functional.cross_entropy(x, y)]
torch.testing.assert_close(*losses)
torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in losses))
print(native.file())
"""
    done = run([python, "-c", code], cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return Path(done.stdout.strip())


@pytest.mark.full
class TestInstalled:
    """Into an environment with torch alone. One of them compiles if the checkout has no objects: 3 minutes."""

    def pip(self, python, *arguments):
        done = run([sys.executable, "-m", "pip", "--python", python, *arguments, "--no-deps", "--no-cache-dir"])
        assert done.returncode == 0, done.stdout + done.stderr

    def test_wheel(self, environment, source, tmp_path):
        python, site = environment
        (site / "torch.pth").write_text(f"{SITE}\n")
        self.pip(python, "wheel", "--no-build-isolation", "-w", tmp_path, source)
        (wheel,) = tmp_path.glob("*.whl")
        with zipfile.ZipFile(wheel) as opened:
            names = {name for name in opened.namelist() if ".dist-info/" not in name}
        assert names == ours("tlkernels", ".py", ".typed") | {"tlkernels/_C" + sysconfig.get_config_var("EXT_SUFFIX")}
        self.pip(python, "install", "--no-index", "--ignore-installed", wheel)
        assert used(python, tmp_path).parent == site / "tlkernels"

    def test_isolated(self, environment, source, tmp_path):
        """Needs the registry: pip installs setuptools for the build."""
        python, site = environment
        (site / "torch.pth").write_text(f"{SITE}\n")
        self.pip(python, "install", "--ignore-installed", source)
        assert used(python, tmp_path).parent == site / "tlkernels"

    def test_editable(self, environment, source, tmp_path):
        python, site = environment
        (site / "torch.pth").write_text(f"{SITE}\n")
        self.pip(python, "install", "--ignore-installed", "-e", source)
        assert used(python, tmp_path).parent == source / "tlkernels"
