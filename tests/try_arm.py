"""Cross-compiles the C++ kernels for aarch64 Linux and runs them in user-mode emulation.

`python -m tests.try_arm [pytest arguments]`: without arguments the self-check, `python -m
flashmark`. It needs g++-aarch64-linux-gnu, qemu-user and apt of Debian, and keeps all it fetches (5
GB: PyTorch for aarch64 wants the libraries of CUDA) and compiles in build/arm. Emulation takes
minutes to import torch.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "build" / "arm"
SITE, SYSTEM, WHEELS, OBJECTS = (HOME / name for name in ("site", "root", "wheels", "objects"))
LIBRARIES = "usr/lib/aarch64-linux-gnu"
PYTHON = "3.11"  # Debian 12's
TORCH = "torch==2.13.0"
NEEDED = (TORCH, "numpy", "pytest", "hypothesis", "setuptools<82")
TAGS = ("2014", *(f"_2_{minor}" for minor in (17, 18, 24, 25, 26, 27, 28)))  # of manylinux
PROCESSOR = "neoverse-n1"
# What PyTorch asks the system about its processor: the emulator shows it the host's otherwise.
FACTS = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd atomics fphp asimdhp asimdrdm asimddp\n"
    "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\n"
    "CPU revision\t: 1\n\n",
    "sys/devices/system/cpu/cpu0/regs/identification/midr_el1": "0x00000000413fd0c1\n",
    "sys/devices/system/cpu/present": "0\n",
    "sys/devices/system/cpu/possible": "0\n",
}


def run(*command: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(x) for x in command], check=True, **options)


def fetch_packages() -> None:
    """PyTorch and what the tests need, for aarch64, unpacked side by side."""
    platforms = [f"--platform=manylinux{tag}_aarch64" for tag in TAGS]
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--dest", WHEELS)
    run(*pip, *platforms, f"--python-version={PYTHON}", "--only-binary=:all:", *NEEDED)
    for wheel in WHEELS.glob("*.whl"):
        if not wheel.name.startswith("triton"):  # its tests are not run here
            shutil.unpack_archive(wheel, SITE, "zip")


def fetch_system() -> None:
    """Python and the C library for aarch64, out of Debian's packages; the host is not changed."""
    apt, debs = HOME / "apt", HOME / "debs"
    for folder in ("lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    debs.mkdir(exist_ok=True)
    options = {
        "APT::Architecture": "arm64", "APT::Architectures": "arm64",
        "Dir::State::lists": apt / "lists", "Dir::State::status": apt / "status",
        "Dir::Cache": apt, "APT::Sandbox::User": "root",
    }  # fmt: skip
    given = [f"-o{name}={value}" for name, value in options.items()]
    run("apt-get", *given, "update", "-qq")
    wanted = ("python3", "libgomp1", "libstdc++6")
    found = run(
        "apt-get", *given, "install", "--print-uris", "-qq", "-y", "--no-install-recommends",
        *wanted, capture_output=True, text=True,
    ).stdout  # fmt: skip
    names = [line.split()[1].split("_")[0] for line in found.splitlines() if ".deb" in line]
    run("apt-get", *given, "download", "-qq", *names, cwd=debs)
    for deb in debs.glob("*.deb"):
        run("dpkg", "-x", deb, SYSTEM)
    for name, text in FACTS.items():
        path = SYSTEM / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def compile_kernels() -> None:
    """_cpu_default.so and _native.so, with the flags of csrc/build.py."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "csrc" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    include = SITE / "torch" / "include"
    common = [
        *build.COMMON, *build.OPENMP, *build.QUIET, "-Wno-psabi", "-fPIC", "-DNDEBUG",
        "-DTORCH_API_INCLUDE_EXTENSION_H", "-DPy_LIMITED_API=0x030B0000", "-isystem", include,
        "-isystem", include / "torch" / "csrc" / "api" / "include",
        "-isystem", sysconfig.get_paths()["include"],
    ]  # fmt: skip
    csrc = ROOT / "csrc"
    stable = [csrc / "registration.cpp"]
    stable += [path for part in ("tiles", "landmark_core") for path in csrc.glob(f"{part}/*.cpp")]
    libraries = {
        "_cpu_default": (
            [*csrc.glob("cpu/*/*.cpp")],
            [*build.CAPABILITIES["default"], "-I", csrc / "cpu"],
        ),
        "_native": (stable, ["-fopenmp-simd", build.STABLE]),
    }
    OBJECTS.mkdir(exist_ok=True)
    for library, (sources, flags) in libraries.items():
        objects = {OBJECTS / f"{x.parent.name}-{x.stem}.o": x for x in sources}
        compiler = ("aarch64-linux-gnu-g++", *common, *flags)
        jobs = [(*compiler, "-c", source, "-o", target) for target, source in objects.items()]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda command: run(*command), jobs))
        run(
            "aarch64-linux-gnu-g++", "-shared", *build.OPENMP, *objects,
            "-L", SITE / "torch" / "lib", "-ltorch", "-ltorch_cpu", "-lc10",
            "-Wl,--unresolved-symbols=ignore-in-shared-libs",
            "-o", SITE / "flashmark" / f"{library}.so",
        )  # fmt: skip


def copy_package() -> None:
    shutil.rmtree(SITE / "flashmark", ignore_errors=True)
    built = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "python" / "flashmark", SITE / "flashmark", ignore=built)
    shutil.copytree(ROOT / "kernels", SITE / "flashmark" / "kernels", ignore=built)


def main() -> None:
    HOME.mkdir(parents=True, exist_ok=True)
    for folder, fetch in ((SITE, fetch_packages), (SYSTEM, fetch_system)):
        if not folder.exists():
            fetch()
    copy_package()
    compile_kernels()
    places = [SYSTEM / LIBRARIES, *sorted(SITE.glob("nvidia/*/lib"))]
    environment = {
        "LD_LIBRARY_PATH": ":".join(map(str, places)), "PYTHONPATH": SITE, "OMP_NUM_THREADS": 1,
    }  # fmt: skip
    given = [x for name, value in environment.items() for x in ("-E", f"{name}={value}")]
    arguments = sys.argv[1:]
    module = (
        ["-m", "pytest", "-p", "no:cacheprovider", *arguments] if arguments else ["-m", "flashmark"]
    )
    emulator = ("qemu-aarch64", "-cpu", PROCESSOR, "-L", SYSTEM, *given)
    run(*emulator, SYSTEM / "usr" / "bin" / f"python{PYTHON}", "-u", "-m", *module, cwd=ROOT)


if __name__ == "__main__":
    main()
