"""Run Python with kernels under a sanitizer: ``python tests/native/sanitized.py [--built] KIND COMMAND...``.

KIND is ``address`` (AddressSanitizer, UndefinedBehaviorSanitizer and edge coverage for the fuzzer) or
``thread`` (ThreadSanitizer). The extension is built as setup.py describes it, with other flags, into a
copy of the package under build/; COMMAND (arguments of Python, as ``-m pytest tests/...``) then runs
with that package and with the sanitizer's runtime loaded first, once for every instruction set of this
machine or only for the one that CNNLSTM_FAST_ISA names; under ``baseline`` the others are not built.
Without COMMAND it only builds; with ``--built`` it runs what an earlier call has built, so that several
may run at once.

PyTorch and Python themselves are not instrumented. AddressSanitizer still sees their memory, since it
replaces malloc. ThreadSanitizer would not see how PyTorch's threads wait for each other, so there
`threads.cpp` takes the place of ``at::parallel_for`` with threads that it understands.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
ISAS = ("baseline", "avx2", "avx512")

#: kind -> (compiler flags, sanitizer runtime, helper that is loaded beside it)
KINDS = {
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined",
         "-fsanitize-coverage=trace-pc"],
        "libasan.so", "coverage.cpp",
    ),
    "thread": (["-fsanitize=thread"], "libtsan.so", "threads.cpp"),
}  # fmt: skip

OPTIONS = {
    # Leaks: Python's own. Fresh memory is filled with 0xff: a NaN in every float type.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_malloc_fill_size=1073741824:"
    "malloc_fill_byte=255:abort_on_error=1:handle_segv=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:abort_on_error=1",
}


def baseline_only() -> bool:
    return os.environ.get("CNNLSTM_FAST_ISA") == "baseline"


def folder_of(kind: str) -> Path:
    return ROOT / "build" / (f"sanitize-{kind}-baseline" if baseline_only() else f"sanitize-{kind}")


def build(kind: str) -> None:
    """Build the kernels for ``kind`` in :func:`folder_of` it, a folder like a checkout."""
    flags, _, helper = KINDS[kind]
    folder = folder_of(kind)
    package = folder / "cnnlstm_fast"
    package.mkdir(parents=True, exist_ok=True)
    for link in (*folder.iterdir(), *package.iterdir()):
        if link.is_symlink():
            link.unlink()
    for name in ("tests", "benchmarks", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for source in (ROOT / "cnnlstm_fast").iterdir():
        if source.suffix != ".so" and source.name not in ("__pycache__", "kernels"):
            (package / source.name).symlink_to(source)
    (package / "kernels").symlink_to(ROOT / "kernels")

    compiler = os.environ.get("CXX", "g++")
    own = [f for f in flags if "coverage" not in f] if kind == "thread" else []
    subprocess.run(
        [compiler, "-O1", "-g", "-std=c++17", "-fPIC", "-shared", *own, str(HERE / helper), "-o",
         str(folder / "helper.so")],
        check=True,
    )  # fmt: skip

    import setuptools  # noqa: F401, I001  (brings its own distutils)
    from distutils.core import run_setup

    os.chdir(ROOT)
    distribution = run_setup("setup.py", ["-q", "build_ext"], stop_after="commandline")
    for module in distribution.ext_modules:
        if baseline_only():
            others = ("csrc/cpu/kernels_avx", "csrc/cpu/bfloat16/kernels_", "csrc/cpu/int8/kernels_")
            emulated = "csrc/cpu/bfloat16/kernels_emulated_amx.cpp"
            module.sources = [s for s in module.sources if s == emulated or not s.startswith(others)]
            module.sources.append("tests/native/baseline_only.cpp")
        module.extra_compile_args += [
            # Half the time of -O1 to compile; the tests take half as long again, which is less.
            "-Og",
            "-g1",
            "-fno-omit-frame-pointer",
            "-Wno-maybe-uninitialized",
            *flags,
        ]
        module.extra_link_args += [f for f in flags if "coverage" not in f]
    command = distribution.get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(folder), str(folder / "objects")
    command.ensure_finalized()
    command.run()
    if not list(package.glob("_C*.so")):
        raise SystemExit(f"the kernels were not built with {' '.join(flags)}")


def environment(kind: str, folder: Path) -> dict[str, str]:
    """Environment variables under which Python runs with the build of ``kind`` in ``folder``."""
    _, runtime, _ = KINDS[kind]
    compiler = os.environ.get("CXX", "g++")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout
        for name in (runtime, "libstdc++.so")  # the latter first, so that throwing is intercepted
    ]
    return OPTIONS | {
        "LD_PRELOAD": " ".join([*(str(Path(f.strip()).resolve()) for f in found), str(folder / "helper.so")]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])),
        "CNNLSTM_FAST_SANITIZED": kind,
    }


def main(kind: str, *command: str, built: bool = False) -> int:
    if kind not in KINDS:
        raise SystemExit(f"got {kind!r}, expected one of {', '.join(KINDS)}")
    if not built:
        build(kind)
    if not command:
        return 0
    folder = folder_of(kind)
    env = os.environ | environment(kind, folder)
    # ThreadSanitizer wants its memory where address randomisation may have put something else.
    start = ["setarch", "-R", sys.executable] if kind == "thread" else [sys.executable]
    asked = os.environ.get("CNNLSTM_FAST_ISA")
    ask = "import cnnlstm_fast, torch; print(torch.ops.cnnlstm_fast.isa())"
    for isa in [asked] if asked else ISAS:
        env["CNNLSTM_FAST_ISA"] = isa
        ran = subprocess.run([*start, "-c", ask], env=env, cwd=folder, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"the sanitized kernels do not load: {ran.stdout}{ran.stderr}")
        if ran.stdout.strip() != isa:
            print(f"{kind} sanitizer: this machine has no {isa}, left out", flush=True)
            continue
        print(f"{kind} sanitizer, instruction set {isa}", flush=True)
        code = subprocess.run([*start, *command], env=env, cwd=folder).returncode
        if code:
            return code
    return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    if built := given[:1] == ["--built"]:
        del given[0]
    if not given:
        raise SystemExit(__doc__)
    sys.exit(main(*given, built=built))
