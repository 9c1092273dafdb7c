"""What is shipped: the binary's symbols, the source archive, the wheel; and machines that lack something."""

from __future__ import annotations

import ast
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from forked import run_forked
from helpers import needs_extension, run_python

import cnnlstm_fast
from cnnlstm_fast import doctor
from cnnlstm_fast.spec import ACTIVATIONS

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "cpu"
#: The lists of those for units of bfloat16 and of int8.
UNIT_KERNELS = [KERNELS / of / "kernels.inc" for of in ("bfloat16", "int8")]
LIBRARY = next(iter(Path(cnnlstm_fast.__file__).parent.glob("_C*.so")), None)
needs_checkout = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a checkout")


def run(*command, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


# ------------------------------------------------------------- the binary


def symbols(*flags: str) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed: binutils has it")
    lines = run(nm, "-D", *flags, str(LIBRARY)).splitlines()
    return [line.split()[-1].partition("@")[0] for line in lines]


@needs_extension
def test_only_stable_symbols_of_torch():
    """Nothing of C++ PyTorch (at::, c10::, torch::) is needed, only the C functions of the stable ABI."""
    undefined = symbols("--undefined-only")
    mangled = [s for s in undefined if re.match(r"_ZN?K?[A-Z]*(2at|3c10|5torch|5caffe2)", s)]
    assert not mangled
    of_torch = [s for s in undefined if s.startswith(("aoti_torch_", "torch_"))]
    assert "torch_call_dispatcher" in of_torch and "torch_parallel_for" in of_torch
    others = [s for s in undefined if s not in of_torch and not s.startswith("_Z")]
    foreign = [s for s in others if re.match(r"(at|c10|torch|Py|GOMP|omp|kmp)_?[A-Z_]", s, re.IGNORECASE)]
    assert not foreign, "neither Python's nor a second OpenMP runtime's"


@needs_extension
def test_nothing_of_ours_is_exported():
    """All our names are hidden, so that two builds in one process cannot meet."""
    ours = [s for s in symbols("--defined-only") if "cnnlstm_fast" in s]
    assert not ours


@needs_extension
def test_needs_no_library_but_torchs_and_the_systems():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed: binutils has it")
    needed = re.findall(r"NEEDED.*\[(.*)\]", run(readelf, "-d", str(LIBRARY)))
    allowed = ("libc10", "libtorch", "libstdc++", "libgcc_s", "libc.so", "libm.so", "libpthread", "ld-linux")
    assert needed and all(name.startswith(allowed) for name in needed), needed


@needs_extension
@pytest.mark.some(1)
@pytest.mark.parametrize(
    "name", ["kernels_avx512.cpp", "bfloat16/kernels_avx512_bf16.cpp", "int8/kernels_amx.cpp"]
)
def test_kernels_of_instruction_sets_share_no_function(name, tmp_path):
    """A weak symbol of an AVX-512 file could be the copy that the linker keeps for all processors."""
    compiler, nm = shutil.which(os.environ.get("CXX", "g++")), shutil.which("nm")
    if compiler is None or nm is None or not (ROOT / "csrc").is_dir():
        pytest.skip("needs a checkout, a C++ compiler and nm")
    source = KERNELS / name
    compiled = tmp_path / "kernels.o"
    run(
        compiler,
        "-O0",
        "-std=c++17",
        "-fvisibility=hidden",
        "-Wno-psabi",
        "-c",
        str(source),
        "-o",
        str(compiled),
    )
    weak = [line for line in run(nm, str(compiled)).splitlines() if line.split()[-2] in "WwVvu"]
    assert not [line for line in weak if "DW.ref." not in line]  # a pointer, not code


@pytest.mark.first
@needs_checkout
def test_kernels_compile_without_any_x86(tmp_path):
    """The baseline as another processor's compiler sees it: no intrinsics, no target attributes.

    The cross compiler for aarch64 where there is one, else this machine's with __x86_64__ undefined.
    """
    compiler, *pretend = without_x86(tmp_path)
    sources = [*KERNELS.glob("kernels_*.cpp"), *KERNELS.glob("*/kernels_*.cpp")]
    for source in sources:
        run(compiler, "-fsyntax-only", "-std=c++17", "-Wno-psabi", *pretend, str(source))
    for source in sources:  # and none got in by another way
        if pretend:
            seen = run(compiler, "-E", "-std=c++17", *pretend, str(source))
            assert "_mm256_" not in seen and "_mm512_" not in seen, source


def without_x86(folder: Path) -> list[str]:
    """A compiler for aarch64, or this machine's and flags with which it takes the machine for one."""
    cross = shutil.which("aarch64-linux-gnu-g++")
    if cross:
        return [cross]
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    (folder / "gnu").mkdir()
    (folder / "gnu" / "stubs-32.h").touch()  # the C library's headers take this for a 32-bit machine
    return [compiler, "-U__x86_64__", "-U__x86_64", "-D__aarch64__", "-isystem", str(folder)]


def including(instruction_set: Path, kernels: list[Path], to: Path) -> Path:
    """As the file of an instruction set, with only these kernels in place of the list of all."""
    named = [
        "common/target_begin.inc",
        *(str(k.relative_to(KERNELS)) for k in kernels),
        "common/target_end.inc",
    ]
    lines = "\n".join(f'#include "{name}"' for name in named)
    text = instruction_set.read_text()
    assert text.count('#include "kernels.inc"') == 1
    to.write_text(text.replace('#include "kernels.inc"', lines))
    return to


@needs_checkout
def test_every_kernel_file_includes_what_it_needs(tmp_path):
    """Alone for the baseline without x86; in random order for all sets, whose intrinsics parse slowly."""
    kernels = sorted(
        k for k in KERNELS.glob("*/*.inc") if not k.name.startswith("target_") and k not in UNIT_KERNELS
    )
    assert len(kernels) > 30
    compiler, *pretend = without_x86(tmp_path)
    check = ["-fsyntax-only", "-std=c++17", "-Wno-psabi", f"-I{KERNELS}"]
    baseline = KERNELS / "kernels_baseline.cpp"
    calls = [
        [compiler, *check, *pretend, str(including(baseline, [kernel], tmp_path / f"alone{i}.cpp"))]
        for i, kernel in enumerate(kernels)
    ]
    native = shutil.which(os.environ.get("CXX", "g++"))
    if native and platform.machine() in ("x86_64", "AMD64"):
        for source in KERNELS.glob("kernels_*.cpp"):
            together = [k for k in kernels if k.name != "tiles.inc"]  # dot.inc stands in its place
            shuffled = random.sample(together, len(together))
            calls.append([native, *check, str(including(source, shuffled, tmp_path / source.name))])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda call: run(*call), calls))


@needs_checkout
def test_list_of_kernels_names_every_file():
    """What the lists include, by way of others too, is all there is."""
    todo = [KERNELS / "kernels.inc", *UNIT_KERNELS]
    found = {k.resolve() for k in UNIT_KERNELS}
    while todo:
        file = todo.pop()
        for name in re.findall(r'#include "(.*\.inc)"', file.read_text()):
            included = (file.parent / name).resolve()
            if included not in found:
                found.add(included)
                todo.append(included)
    assert found == {f.resolve() for f in KERNELS.glob("*/*.inc")}


@pytest.mark.first
@needs_checkout
def test_kernels_of_aarch64_under_emulation(tmp_path):
    """The NEON kernels of blocks and of recurrent layers, run by an emulator, against plain loops."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    build = [compiler, "-O2", "-static"]
    assert_as_plain_loops(build, [*KERNELS.glob("*.cpp")], [emulator], tmp_path)


@needs_checkout
@pytest.mark.long
def test_baseline_kernels_without_pytorch(tmp_path):
    """What the emulator runs, on this machine. Long: compiling the baseline kernels once more takes 20 s."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    kernels = [KERNELS / "dispatch.cpp", KERNELS / "kernels_baseline.cpp"]
    kernels.append(ROOT / "tests" / "native" / "baseline_only.cpp")
    assert_as_plain_loops([compiler, "-O1"], kernels, [], tmp_path)


def assert_as_plain_loops(build: list[str], kernels: list[Path], emulator: list[str], folder: Path) -> None:
    sources = [ROOT / "tests" / "native" / "emulated.cpp", *kernels]
    program = str(folder / "emulated")
    run(*build, "-std=c++17", "-ffp-contract=fast", "-Wno-psabi", *map(str, sources), "-o", program)
    said = run(*emulator, program).splitlines()
    assert said[0] == "baseline" and len(said) == 1 + 2 * len(ACTIVATIONS) + 6


# ------------------------------------------------------------- archives


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    if not (ROOT / "setup.py").is_file():
        pytest.skip("needs a checkout")
    folder, tree = tmp_path_factory.mktemp("archive"), tmp_path_factory.mktemp("tree") / "tree"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", "build", "*.so", "__pycache__", "*.egg-info", ".*cache"
    )
    shutil.copytree(ROOT, tree, ignore=left_out)
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(folder), cwd=tree)
    return next(folder.glob("*.tar.gz"))


def tracked() -> list[str]:
    """Files of the checkout that a build or a test needs."""
    folders = ("cnnlstm_fast", "csrc", "kernels", "tests", "benchmarks", "docs", "examples")
    found = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file()]
    names = [p.relative_to(ROOT).as_posix() for p in found]
    built = re.compile(r"__pycache__|\.so$|\.pyc$|egg-info")
    return [n for n in names if not built.search(n)] + ["setup.py", "pyproject.toml", "README.md", "LICENSE"]


def test_source_archive_has_everything(archive):
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    missing = [name for name in tracked() if name not in names]
    assert not missing
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


_SMOKE = """
import torch, cnnlstm_fast as cf, cnnlstm_fast.kernels
from cnnlstm_fast import _ext
print(cf.__file__)
x = torch.randn(2, 4, 3, 28, 28)
fast = cf.CNN_LSTM_TimeDistributed(3, 8, 1, 10)
plain = cf.reference.CNN_LSTM_TimeDistributed(3, 8, 1, 10)
plain.load_state_dict(fast.state_dict())
torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
fast(x).sum().backward()
gru = cf.GRU(5, 7)
out, _ = gru(torch.randn(6, 3, 5), lengths=[6, 2, 1])
assert out.shape == (6, 3, 7)
print(_ext.error)
"""


@pytest.mark.long
def test_wheel_from_the_source_archive(archive, tmp_path):
    """Built from the archive alone, installed into an empty environment, and tested from there."""
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index",
        "--disable-pip-version-check", "-w", str(tmp_path), str(archive),
        env=os.environ | {"CNNLSTM_FAST_REQUIRE_EXTENSION": "1"})  # fmt: skip
    wheel = next(tmp_path.glob("*.whl"))
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    whole = {"_C.abi3.so", "kernels/conv_block.py", "py.typed"}
    assert {f"cnnlstm_fast/{name}" for name in whole} <= {*names}
    assert not [n for n in names if n.startswith(("tests", "benchmarks", "csrc"))]

    home = tmp_path / "clean"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    # torch and pytest are seen where they are installed; their folder comes behind the wheel's own
    (site / "zz_torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    run(
        python,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--disable-pip-version-check",
        str(wheel),
    )
    said = run(python, "-P", "-c", _SMOKE, cwd=tmp_path).splitlines()
    assert Path(said[0]).is_relative_to(site) and said[1] == "None", said

    copied = tmp_path / "tests"
    shutil.copytree(ROOT / "tests", copied, ignore=shutil.ignore_patterns("__pycache__"))
    run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path),
        *(f"{copied}/test_{of}.py" for of in ("layouts", "models", "recurrent")), cwd=tmp_path)  # fmt: skip


# ------------------------------------------------------------- what a machine may lack

_WITHOUT = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Refuse())
"""


def from_folder(folder: Path) -> str:
    """What makes a program import the package from there, whatever is installed."""
    return f"import sys; sys.path.insert(0, {str(folder)!r})\n"


@pytest.mark.some(2)
@pytest.mark.parametrize(
    "missing",
    [
        ["triton"],
        ["typer", "rich", "matplotlib", "sklearn"],
        ["numpy", "onnx", "onnxruntime"],
        ["setuptools"],
    ],
    ids=",".join,
)
def test_without(missing):
    """Import and run; none of these is needed."""
    smoke = _SMOKE.replace(", cnnlstm_fast.kernels", "")
    ran = run_python(_WITHOUT.format(missing=set(missing)) + smoke)
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.parametrize("extension", ["0", "1"])
def test_without_a_compiler(extension, tmp_path):
    """Nothing is compiled at import or in a call: an empty PATH, and no place to write."""
    lacks = {"PATH": str(tmp_path), "CC": "none", "CXX": "none", "HOME": str(tmp_path / "nowhere")}
    ran = run_forked(f"import os; os.environ |= {lacks}\n{_SMOKE}", CNNLSTM_FAST_NO_EXTENSION=extension)
    assert ran.returncode == 0, ran.stderr[-2000:]
    said = ran.stdout.splitlines()[1]
    assert ("CNNLSTM_FAST_NO_EXTENSION" in said) == (extension == "1")


def test_a_broken_library_is_not_fatal(tmp_path):
    """A library of another machine, or half a download: the package says so, and runs without."""
    package = tmp_path / "cnnlstm_fast"
    shutil.copytree(
        Path(cnnlstm_fast.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    (package / "_C.abi3.so").write_bytes(b"\x7fELF" + bytes(60))
    ran = run_forked(from_folder(tmp_path) + _SMOKE.replace(", cnnlstm_fast.kernels", ""))
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert str(tmp_path) in ran.stdout and "_C.abi3.so does not load" in ran.stdout


@needs_checkout
def test_the_version_stands_in_one_place():
    """In the package; the archives and the site read it there, and what cannot read it says the same."""
    version = cnnlstm_fast.__version__
    done = run(sys.executable, "setup.py", "-q", "--version", cwd=ROOT)
    assert done.splitlines()[-1] == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.MULTILINE) == [version]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"cnnlstm_fast {version}" in doctor.report()["versions"].value
    assert "release = cnnlstm_fast.__version__" in (ROOT / "docs" / "conf.py").read_text()
    kept = [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "docs" / "conf.py"]
    assert not [path.name for path in kept if version in path.read_text()]


@needs_checkout
def test_metadata():
    """Supported Pythons, and a floor of torch that setup.py compiles for."""
    project = (ROOT / "pyproject.toml").read_text()
    setup = (ROOT / "setup.py").read_text()
    assert 'requires-python = ">=3.10"' in project and "0x030a0000" in setup
    floor = re.search(r"torch>=2\.(\d+)", project)
    target = re.search(r'TARGET_TORCH = "0x02([0-9a-f]{2})', setup)
    assert int(floor[1]) == int(target[1], 16)


# ------------------------------------------------------------- built without kernels


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory) -> Path:
    """A folder with the package as an installation without kernels leaves it."""
    folder = tmp_path_factory.mktemp("unbuilt")
    package = Path(cnnlstm_fast.__file__).parent
    shutil.copytree(
        package, folder / "cnnlstm_fast", ignore=shutil.ignore_patterns("__pycache__", "*.so", "kernels")
    )
    return folder


_BLOCK = "cf.functional.conv_block(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3))"
_LAYER = "cf.GRU(3, 4)(torch.randn(5, 2, 3))"


@pytest.mark.parametrize("call", [_BLOCK, _LAYER], ids=["block", "layer"])
def test_the_first_call_without_kernels_warns_once(call, unbuilt):
    code = f"""
import warnings, torch
with warnings.catch_warnings(record=True) as imported:
    warnings.simplefilter("always")
    import cnnlstm_fast as cf
    assert cf.__file__.startswith({str(unbuilt)!r}) and cf.doctor.report()
with warnings.catch_warnings(record=True) as called:
    warnings.simplefilter("always")
    for _ in range(3):
        {call}
        {_BLOCK}
print([str(w.message) for w in imported if "cnnlstm_fast" in str(w.message)])
print([str(w.message) for w in called if "cnnlstm_fast" in str(w.message)])
print(cf.doctor.report()["CPU kernels"].mend)
"""
    code = from_folder(unbuilt) + code
    ran = run_forked(code, CNNLSTM_FAST_NO_EXTENSION="0")
    assert ran.returncode == 0, ran.stderr[-2000:]
    imported, called, mend = ran.stdout.splitlines()
    assert imported == "[]"
    (said,) = ast.literal_eval(called)
    assert "no compiled CPU kernels" in said and "pip install --no-build-isolation" in said
    assert said.rpartition("To get them: ")[2] in mend
    ran = run_forked(code, CNNLSTM_FAST_NO_EXTENSION="1")
    assert ran.stdout.splitlines()[1] == "[]", "who forbids them knows"


@needs_extension
def test_a_call_with_kernels_does_not_warn():
    refuse = "import warnings; warnings.simplefilter('error', UserWarning)"
    ran = run_forked(f"{refuse}; import torch, cnnlstm_fast as cf; {_BLOCK}; {_LAYER}")
    assert ran.returncode == 0, ran.stderr[-2000:]


@needs_checkout
@pytest.mark.parametrize("has_torch", [True, False], ids=["torch", "no torch"])
def test_an_isolated_build_takes_the_environments_torch(has_torch, tmp_path):
    """As pip builds: a Python whose own packages are hidden, and beside it a folder with setuptools."""
    venv.create(tmp_path / "home")
    python = tmp_path / "home" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    isolated = tmp_path / "isolated"
    isolated.mkdir()
    (isolated / "sitecustomize.py").write_text(
        "import sys; sys.path[:] = [p for p in sys.path if not p.endswith('site-packages')]\n"
    )
    for package in Path(torch.__file__).parents[1].iterdir():
        if package.name in ("setuptools", "_distutils_hack", "pkg_resources"):
            (isolated / package.name).symlink_to(package)
        elif has_torch and not package.name.endswith((".pth", "__pycache__")):
            (site / package.name).symlink_to(package)
    env = {k: v for k, v in os.environ.items() if k != "CNNLSTM_FAST_REQUIRE_EXTENSION"}
    command = [python, "setup.py", "-q", "build_ext", "--help"]
    done = subprocess.run(
        command,
        env=env | {"PYTHONPATH": str(isolated)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert ("building without kernels" in done.stderr) != has_torch
    env |= {"PYTHONPATH": str(isolated), "CNNLSTM_FAST_REQUIRE_EXTENSION": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == has_torch


@needs_checkout
def test_no_file_of_code_is_long():
    """Above 700 lines a file holds more than one thing."""
    folders = ("cnnlstm_fast", "csrc", "kernels", "tests", "benchmarks", "examples")
    files = [
        f
        for folder in folders
        for f in (ROOT / folder).rglob("*")
        if f.suffix in (".py", ".cpp", ".h", ".inc")
    ]
    assert len(files) > 200
    assert not [f"{f}: {n}" for f in files if (n := len(f.read_text().splitlines())) > 700]
