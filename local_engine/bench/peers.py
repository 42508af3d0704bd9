"""Owns the servers that this engine is compared with: their versions, how they are installed in environments of their
own, how all of them are started; refuses to touch the environment that runs the benchmark.

llama.cpp's server is built from the source package of llama-cpp-python on PyPI, which carries it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from local_engine.bench.program import BenchError, Launch

TRANSFORMERS = "5.23.0"
TORCH = "2.13.0"
LLAMA_CPP_PYTHON = "0.3.36"
INSTALL_SECONDS = 3 * 3600
"""A build at low priority on two busy cores takes over an hour."""

PROGRESS_SECONDS = 20.0
CACHE_TOKENS = 16_384
"""Of keys and values, in each server."""

BATCH_TOKENS = 512
MOST_STREAMS = 32
PROBLEM_LINES = 3

Say = Callable[[str], None]

LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_OPENMP=OFF",
    "-DGGML_CPU_REPACK=OFF",
    "-DLLAMA_ALL_WARNINGS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)
"""Only what the server needs, for this machine's CPU, without a download. Repacking is for 4- and 8-bit weights, which
are not measured here."""


def install_transformers(work: Path, say: Say) -> Path:
    """`transformers` with its server, in an environment of its own; the program. Raises BenchError."""
    home = work / f"transformers-{TRANSFORMERS}"
    program = home / "venv/bin/transformers"
    if (home / "installed").exists():
        return program
    home.mkdir(parents=True, exist_ok=True)
    say(f"installing transformers {TRANSFORMERS} with its server into {home}")
    _run("python -m venv", [sys.executable, "-m", "venv", "venv"], home, say)
    wanted = [f"transformers[serving]=={TRANSFORMERS}", f"torch=={TORCH}", "accelerate"]
    _run("pip install transformers[serving]", ["venv/bin/python", "-m", "pip", "install", "-q", *wanted], home, say)
    (home / "installed").touch()
    return program


def install_llama(work: Path, say: Say, jobs: int | None = None) -> Path:
    """llama.cpp's server, built at low priority by so many compilers at once (None: as many as there are cores); the
    program. What an interrupted build has done is kept. Raises BenchError where a compiler is missing or it does not
    build."""
    home = work / f"llama-cpp-python-{LLAMA_CPP_PYTHON}"
    program = home / "built/bin/llama-server"
    if (home / "installed").exists():
        return program
    if missing := [tool for tool in ("cc", "c++") if shutil.which(tool) is None]:
        raise BenchError(
            f"llama.cpp's server is not built: there is no {' and no '.join(missing)}; install a C and C++ compiler "
            "(Debian: apt-get install g++)"
        )
    home.mkdir(parents=True, exist_ok=True)
    say(f"building llama.cpp's server of llama-cpp-python {LLAMA_CPP_PYTHON} in {home}, which can take an hour")
    source = home / "source"
    if not (home / "unpacked").exists():
        shutil.rmtree(source, ignore_errors=True)
        wanted = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={LLAMA_CPP_PYTHON}"]
        _run("pip download", [sys.executable, "-m", "pip", "download", "-q", *wanted, "-d", str(home)], home, say)
        shutil.unpack_archive(next(home.glob("*.tar.gz")), source)
        (home / "unpacked").touch()
    tree = next(source.glob("*/vendor/llama.cpp"))
    nice = ["nice", "-n", "19"] if shutil.which("nice") else []
    path = _builders(home, say)
    _run("cmake", [*nice, "cmake", "-S", str(tree), "-B", "built", "-G", "Ninja", *LLAMA_OPTIONS], home, say, path)
    build = [*nice, "ninja", "-C", "built", "-j", str(jobs or os.cpu_count() or 1), "llama-server"]
    _run("ninja", build, home, say, path)
    if not program.exists():
        raise BenchError("llama.cpp's server was built, but not where it was expected: built/bin/llama-server")
    (home / "installed").touch()
    return program


def _builders(home: Path, say: Say) -> str:
    """A PATH on which cmake and ninja are: the system's, or else those that PyPI has as wheels. Raises BenchError."""
    path = os.environ.get("PATH", os.defpath)
    if shutil.which("cmake") and shutil.which("ninja"):
        return path
    found = home / "builders/bin"
    if not ((found / "cmake").exists() and (found / "ninja").exists()):
        _run("python -m venv", [sys.executable, "-m", "venv", "builders"], home, say)
        wanted = [str(found / "python"), "-m", "pip", "install", "-q", "cmake<4", "ninja"]
        _run("pip install cmake ninja", wanted, home, say)
    return f"{found}{os.pathsep}{path}"


def _run(what: str, command: list[str], directory: Path, say: Say, path: str | None = None) -> None:
    """One step of an installation, its last line told now and then. Raises BenchError with what it said."""
    log = directory / "install.log"
    environment = dict(os.environ) if path is None else {**os.environ, "PATH": path}
    began = told = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - what this file says
            command, cwd=directory, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                time.sleep(0.2)
                now = time.monotonic()
                if now - told > PROGRESS_SECONDS:
                    told = now
                    say(f"{what}, {now - began:.0f} s: {_last(log)}")
                if now - began > INSTALL_SECONDS:
                    raise BenchError(f"{what}: not finished after {INSTALL_SECONDS} s; the next run goes on from there")
        finally:
            if process.poll() is None:  # also on Ctrl-C, which its session does not hear
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if process.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()
        said = [line.strip() for line in lines if "error" in line.lower()] or lines[-1:] or ["no output"]
        raise BenchError(f"{what}: exit code {process.returncode}: {' | '.join(said[:PROBLEM_LINES])}")


def _last(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:100] if lines else "…"


def ours(model: Path, precision: str, port: int) -> Launch:
    """This engine, from the environment and the source that run the benchmark."""
    how = ("--dtype", "float32") if precision == "fp32" else ("--quantization", precision)
    limits = ("--kv-cache-tokens", str(CACHE_TOKENS), "--max-batch-tokens", str(BATCH_TOKENS))
    command = (sys.executable, "-m", "local_engine", "serve", "--model", str(model), "--served-name", "bench")
    running = ("--max-running", str(MOST_STREAMS), "--port", str(port))
    return Launch("hybridgate", (*command, *how, *limits, *running), port, "/health", "bench")


def transformers(program: Path, model: Path, precision: str, port: int, device: str = "cpu") -> Launch:
    """`transformers serve` with continuous batching."""
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[precision]
    options = ("--continuous-batching", "--device", device, "--dtype", dtype, "--host", "127.0.0.1")
    cache = ("--cb-block-size", "32", "--cb-num-blocks", str(CACHE_TOKENS // 32))
    batch = ("--cb-max-batch-tokens", str(BATCH_TOKENS), "--port", str(port), "--log-level", "error")
    environment = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = (str(program), "serve", str(model), *options, *cache, *batch)
    return Launch("transformers", command, port, "/health", str(model), environment)


def llama(program: Path, gguf: Path, port: int) -> Launch:
    """llama.cpp's server with one thread; its slots share the cache."""
    threads = ("-t", "1", "-tb", "1", "--threads-http", "2")
    slots = ("-c", str(CACHE_TOKENS), "-np", str(MOST_STREAMS), "--kv-unified", "-b", str(BATCH_TOKENS))
    rest = ("-ub", str(BATCH_TOKENS), "--host", "127.0.0.1", "--port", str(port), "--jinja", "--offline")
    return Launch("llama.cpp", (str(program), "-m", str(gguf), *threads, *slots, *rest), port, "/health", "bench")


def neighbours() -> str:
    """The load of the machine, as the system tells it."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())
