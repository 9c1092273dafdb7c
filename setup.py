"""Build the CPU kernels against LibTorch's stable ABI: one `_C.abi3.so` serves torch 2.11 and later.

A failed build is not fatal: the package then runs on its reference plan, its first call warns, and
`python -m cnnlstm_fast doctor` says what is missing. CNNLSTM_FAST_REQUIRE_EXTENSION=1 makes it fatal.

pip builds in an environment of its own, where no torch is. Any torch from 2.11 on will do, so the one of the
environment that pip installs into is taken, rather than a second one downloaded.
"""

import os
import sys
import sysconfig

from setuptools import setup

TARGET_TORCH = "0x020b000000000000"  # 2.11

sources = [
    "csrc/block_description.cpp",
    "csrc/block_rows.cpp",
    "csrc/conv_block.cpp",
    "csrc/conv_fft.cpp",
    "csrc/conv_norm.cpp",
    "csrc/conv_plan.cpp",
    "csrc/epilogue.cpp",
    "csrc/fingerprint.cpp",
    "csrc/frozen_conv.cpp",
    "csrc/frozen_ops.cpp",
    "csrc/int8_packing.cpp",
    "csrc/library_calls.cpp",
    "csrc/library_limits.cpp",
    "csrc/limits.cpp",
    "csrc/machine.cpp",
    "csrc/memory.cpp",
    "csrc/norm_statistics.cpp",
    "csrc/packed_library.cpp",
    "csrc/packed_map.cpp",
    "csrc/packed_memory.cpp",
    "csrc/packed_pairs.cpp",
    "csrc/packed_recurrent.cpp",
    "csrc/plan_chunked.cpp",
    "csrc/plan_direct.cpp",
    "csrc/plan_fft.cpp",
    "csrc/plan_winograd.cpp",
    "csrc/program.cpp",
    "csrc/program_calls.cpp",
    "csrc/program_int8.cpp",
    "csrc/program_linear.cpp",
    "csrc/program_nodes.cpp",
    "csrc/recurrent.cpp",
    "csrc/recurrent_description.cpp",
    "csrc/recurrent_packing.cpp",
    "csrc/recurrent_pairs.cpp",
    "csrc/recurrent_stack.cpp",
    "csrc/recurrent_steps.cpp",
    "csrc/recurrent_stream.cpp",
    "csrc/tensors.cpp",
    "csrc/winograd_conv.cpp",
    "csrc/cpu/kernels_avx512.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_baseline.cpp",
    "csrc/cpu/bfloat16/dispatch.cpp",
    "csrc/cpu/bfloat16/kernels_amx.cpp",
    "csrc/cpu/bfloat16/kernels_avx512_bf16.cpp",
    "csrc/cpu/bfloat16/kernels_emulated.cpp",
    "csrc/cpu/bfloat16/kernels_emulated_amx.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/int8/dispatch.cpp",
    "csrc/cpu/int8/kernels_amx.cpp",
    "csrc/cpu/int8/kernels_avx512_vnni.cpp",
]


#: Files that the sources beside csrc/cpu are compiled as: most time goes into the headers that they share.
JOINED = 4


def joined(sources, folder):
    """The sources, those of csrc itself as a few files that include them. What takes longest comes first."""
    alike = [source for source in sources if os.path.dirname(source) == "csrc"]
    os.makedirs(folder, exist_ok=True)
    files = [os.path.join(folder, f"joined_{i}.cpp") for i in range(JOINED)]
    for i, file in enumerate(files):
        text = "".join(f'#include "{os.path.abspath(source)}"\n' for source in alike[i::JOINED])
        if not os.path.exists(file) or open(file).read() != text:  # an old one is not compiled again
            with open(file, "w") as new:
                new.write(text)
    return [source for source in sources if source not in alike] + files


def extension():
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class OptionalBuild(BuildExtension):
        def build_extensions(self):
            for module in self.extensions:
                module.sources = joined(module.sources, os.path.join(self.build_temp, "joined"))
            super().build_extensions()

        def run(self):
            try:
                super().run()
            except Exception as error:
                if os.environ.get("CNNLSTM_FAST_REQUIRE_EXTENSION") == "1":
                    raise
                print(f"cnnlstm_fast: the compiled kernels were not built: {error}", file=sys.stderr)
                self.extensions = []

    module = CppExtension(
        "cnnlstm_fast._C",
        sources,
        py_limited_api=True,
        extra_compile_args=[
            "-O3",
            "-std=c++17",
            "-ffp-contract=fast",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            # Python's own flags ask for -g: a quarter of the time to compile, nine tenths of the library.
            *([] if "CFLAGS" in os.environ else ["-g0"]),
            f"-DTORCH_TARGET_VERSION={TARGET_TORCH}",
            "-DPy_LIMITED_API=0x030a0000",
        ],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": OptionalBuild}}


sys.path += {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")} - {*sys.path}  # behind pip's own
try:
    build = extension()
except ImportError as error:
    if os.environ.get("CNNLSTM_FAST_REQUIRE_EXTENSION") == "1":
        raise
    print(f"cnnlstm_fast: no torch at build time ({error}): building without kernels", file=sys.stderr)
    build = {}

setup(options={"bdist_wheel": {"py_limited_api": "cp310"}}, **build)
