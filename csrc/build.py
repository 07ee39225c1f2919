"""Builds the C++ kernels for CPUs; setup.py calls `setup_options`.

One shared library per instruction set, from the same sources: `flashmark.cpu` loads the one that
fits the machine. FLASHMARK_CPU chooses them: "native", the machine's own alone (unless given), or
"all", for a wheel that other machines take. Run as a script to build in place:
`python csrc/build.py [--only avx512]`.
"""

from __future__ import annotations

import argparse
import copy
import os
import platform
import sys
import sysconfig
import warnings
from pathlib import Path

import torch
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).resolve().parent.parent
LOST = {  # what a package without a library misses
    "cpu": "CPU tensors take the slower backend='eager' and backend='cpu' raises an error",
    "native": "the operators of flashmark.native run in plain PyTorch",
}
# -g0: Python's own flags ask for debug information, which doubles the time of a build.
COMMON = ["-O3", "-g0", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
# Apple's compiler has no OpenMP: there the kernels run in one thread.
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
QUIET = ["-Wno-unknown-pragmas", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")
QUIET += ["-Wno-psabi"] if ARM else []
CAPABILITIES = {
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "avx512": [
        *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
        *("-mprefer-vector-width=512", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    ],
    # NEON on ARM; on x86-64 too slow to be of use, but it runs the tests of the same lines there
    "default": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
}
LEVELS = {"avx2": 3, "avx512": 4}  # of x86-64, as the library flashmark/_native.so has copies
WIDE = ["-mprefer-vector-width=512"] if X86 else []
STABLE = (
    "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the oldest torch that may load the library: 2.11
)
ARCHITECTURES = ("80", "90a", "100")
NVCC = ["-O3", "-std=c++20", "-Xptxas=-v,-warn-spills", "--threads=2"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"]


def unsupported() -> str:
    """Why the kernels cannot be built on this machine; empty where they can."""
    if not (X86 or ARM):
        return f"the C++ CPU kernels need an x86-64 or ARM processor, got {platform.machine()}"
    if sys.platform not in ("linux", "darwin"):
        return f"the C++ CPU kernels are built on Linux and macOS only, got {sys.platform}"
    if not capabilities():
        return "the C++ CPU kernels need AVX2 or AVX-512 on x86-64, which this machine lacks"
    return ""


def capabilities() -> list[str]:
    """Instruction sets to build for: those of FLASHMARK_CPU, that of this machine if unset."""
    wish = os.environ.get("FLASHMARK_CPU") or "native"
    if wish not in ("native", "all"):
        raise ValueError(f"FLASHMARK_CPU: expected native or all, got {wish!r}")
    if not X86:
        return ["default"]
    mine = torch.backends.cpu.get_cpu_capability().lower()
    return [name for name in ("avx2", "avx512") if wish == "all" or name == mine]


def cpu_extension(*, sanitize: bool = False, only: str | None = None) -> list[CppExtension]:
    """The libraries _cpu_<instruction set>.so that are wanted, or `only` that one."""
    if only is None and unsupported():
        return []
    sources = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / "cpu").rglob("*.cpp"))
    headers = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc" / "cpu").rglob("*.h"))
    extra = SANITIZE if sanitize else []
    return [
        CppExtension(
            f"flashmark._cpu_{name}",
            sources,
            depends=headers,
            include_dirs=[str(ROOT / "csrc" / "cpu")],
            extra_compile_args=[*COMMON, *OPENMP, *QUIET, *CAPABILITIES[name], *extra],
            extra_link_args=[*OPENMP, *extra],
            py_limited_api=True,
        )
        for name in ([only] if only else capabilities())
    ]


def cuda_missing() -> str:
    """Why the CUDA sources cannot be built; empty where they can."""
    if torch.version.cuda is None:
        return f"the CUDA sources need a CUDA build of torch, got {torch.__version__}"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        return f"the CUDA sources need nvcc, CUDA_HOME is {CUDA_HOME}"
    return ""


def native_extension(*, sanitize: bool = False, cuda: bool = False) -> CppExtension:
    """The library flashmark/_native.so; `cuda` adds the .cu files."""
    kinds = ("*.cpp", "*.cu") if cuda else ("*.cpp",)
    csrc = ROOT / "csrc"
    roots = [csrc / "tiles", csrc / "landmark_core"]
    sources = [
        csrc / "registration.cpp",
        *(p for root in roots for k in kinds for p in root.glob(k)),
    ]
    headers = [*csrc.glob("*.h"), *(p for root in roots for p in root.glob("*.*h"))]
    extra = SANITIZE if sanitize else []
    define = ["-DUSE_CUDA", "-DFLASHMARK_CUDA"] if cuda else []
    wanted = capabilities()
    level = [f"-DFLASHMARK_LEVEL={LEVELS[wanted[0]]}"] if X86 and len(wanted) == 1 else []
    flags = {"cxx": [*COMMON, "-fopenmp-simd", *WIDE, STABLE, *level, *define, *extra]}
    if cuda:
        flags["nvcc"] = [*NVCC, *architectures(), STABLE, *define]
    return (CUDAExtension if cuda else CppExtension)(
        "flashmark._native",
        sorted(p.relative_to(ROOT).as_posix() for p in sources),
        depends=sorted(p.relative_to(ROOT).as_posix() for p in headers),
        extra_compile_args=flags,
        extra_link_args=extra,
        py_limited_api=True,
    )


def architectures() -> list[str]:
    """nvcc's flags for the GPUs that the library is built for; PTX for what comes after them."""
    code = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    last = ARCHITECTURES[-1]
    return [*code, f"-gencode=arch=compute_{last},code=compute_{last}"]


class Build(BuildExtension):
    """A build that keeps the objects of each library for the next one, an editable install's and a
    wheel's alike; unless required, each library may fail."""

    required = False
    # ninja does not look for a newer torch behind headers of the system: a folder for each
    objects = ROOT / "build" / "objects" / f"{sysconfig.get_platform()}-torch-{torch.__version__}"

    def __init__(self, *args, **kwargs) -> None:
        kwargs["no_python_abi_suffix"] = True
        super().__init__(*args, **kwargs)
        self.failed = []

    def build_extensions(self) -> None:
        self.parallel = len(self.extensions)  # no core waits for the last source of a library
        try:
            super().build_extensions()
        except Exception as error:
            if self.required:
                raise
            self._give_up(self.extensions, error)
        self.extensions[:] = [ext for ext in self.extensions if ext not in self.failed]

    def build_extension(self, ext) -> None:
        one = copy.copy(self)
        one.build_temp = str(self.objects / ext.name)
        try:
            super(Build, one).build_extension(ext)
        except Exception as error:
            if self.required:
                raise
            self._give_up([ext], error)

    def _give_up(self, extensions, error: Exception) -> None:
        self.failed += extensions
        for part in dict.fromkeys("native" if "native" in e.name else "cpu" for e in extensions):
            warnings.warn(
                f"built without the C++ of flashmark.{part} ({error}): {LOST[part]}", stacklevel=2
            )


def setup_options(*, required: bool = False, cuda: bool | None = None) -> dict:
    """`ext_modules` and `cmdclass` for setup().

    `required`: a failed build is an error, not a warning. `cuda`: whether to build the CUDA
    sources; None is where nvcc and a CUDA torch are.
    """
    missing = cuda_missing()
    if cuda and missing:
        raise RuntimeError(f"FLASHMARK_BUILD_EXT=cuda: {missing}")
    if required and not cuda and unsupported():
        raise RuntimeError(f"FLASHMARK_BUILD_EXT=1: {unsupported()}")
    extensions = [*cpu_extension(), native_extension(cuda=not missing if cuda is None else cuda)]
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": type("Build", (Build,), {"required": required})},
    }


def main() -> None:
    from setuptools import setup

    parser = argparse.ArgumentParser(description="Build the C++ operators in place.")
    parser.add_argument("--sanitize", action="store_true", help="with sanitizers")
    parser.add_argument("--only", choices=[*CAPABILITIES, "native"], help="build one library")
    parser.add_argument("--to", default="python", help="folder that holds flashmark")
    options = parser.parse_args()
    os.chdir(ROOT)
    settings = {"required": True}
    if options.sanitize:
        settings["objects"] = ROOT / "build" / "sanitize"
    extensions = []
    if options.only != "native":
        extensions += cpu_extension(sanitize=options.sanitize, only=options.only)
    if options.only in (None, "native"):
        extensions.append(native_extension(sanitize=options.sanitize, cuda=not cuda_missing()))
    setup(
        name="flashmark",
        packages=["flashmark"],
        package_dir={"": "python"},
        ext_modules=extensions,
        cmdclass={"build_ext": type("Build", (Build,), settings)},
        script_args=["build_ext", "--build-lib", options.to],
    )


if __name__ == "__main__":
    main()
