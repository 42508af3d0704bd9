"""The Dockerfiles, as far as they can be looked at without building: what they copy, run as, and lock."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.deploy.cluster import DEPLOY, ROOT

DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))


def loaded() -> ModuleType:
    """deploy/without_docker.py, which is a program and no package."""
    spec = importlib.util.spec_from_file_location("without_docker", DEPLOY / "without_docker.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


program = loaded()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_begins_with_a_fixed_tag_and_ends_as_another_user_than_root(path: Path) -> None:
    stages = program.parse(path.read_text(), {})
    bases = {stage.base for stage in stages} - {stage.name for stage in stages}
    assert all(re.fullmatch(r"debian:bookworm-\d{8}-slim", base) for base in bases)
    by_name = {stage.name: stage for stage in stages}
    final = stages[-1]
    steps = [*(by_name[final.base].steps if final.base in by_name else ()), *final.steps]
    users = [step.text for step in steps if step.word == "USER"]
    assert users == ["10001:10001"], "the user that the manifests name"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_an_image_copies_is_part_of_the_context_and_nothing_is_fetched_unlocked(path: Path) -> None:
    context = program.Context(ROOT)
    for stage in program.parse(path.read_text(), {}):
        for step in stage.steps:
            if step.word == "COPY" and "--from=" not in step.text:
                for source in step.text.split()[:-1]:
                    assert list(context.files(source))
            for install in re.findall(r"pip install [^&]*", step.text) if step.word == "RUN" else ():
                assert "--require-hashes" in install or "--no-deps" in install
                assert "--require-hashes" in install or install.rstrip().endswith((".", ".whl")), "ours alone"


def test_the_context_holds_sources_and_no_state() -> None:
    context = program.Context(ROOT)
    held = {"gateway/cli/__init__.py", "requirements/gateway.txt", "pyproject.toml", "deploy/debian.sh"}
    left_out = {"tests/fakes.py", ".git/HEAD", "deploy/README.md", "gateway/__pycache__/app.pyc", "keys.yaml"}
    assert all(context.has(ROOT / name) for name in held)
    assert not any(context.has(ROOT / name) for name in left_out)


@pytest.mark.parametrize(
    "text", ["FROM a\nADD x y", "FROM a\nVOLUME /x", "FROM a\nSHELL [1]", "FROM a\nHEALTHCHECK CMD x"]
)
def test_an_instruction_that_would_be_skipped_is_refused(text: str) -> None:
    with pytest.raises(program.Unsupported):
        program.parse(text, {})


def test_stages_arguments_and_continued_lines_are_read() -> None:
    text = "ARG BASE=a:1\nFROM ${BASE} AS one\n# no\nRUN x \\\n && y\nFROM one\nENV A=1 B='2 3'\n"
    first, second = program.parse(text, {"BASE": "b:2"})
    assert (first.name, first.base, second.name, second.base) == ("one", "b:2", "1", "one")
    assert first.steps == [program.Step("RUN", "x   && y")] and second.steps[0].word == "ENV"


# What the engine's image holds.

PACKAGES = {
    "huggingface_hub": "huggingface-hub",
    "jinja2": "jinja2",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
    "pydantic_core": "pydantic",
}


def test_the_engines_image_holds_what_the_engine_imports() -> None:
    found: set[str] = set()
    for path in (ROOT / "local_engine").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    # torch brings triton where it is for CUDA, and nothing imports it elsewhere.
    wanted = {PACKAGES.get(name, name) for name in found - sys.stdlib_module_names - {"local_engine", "triton"}}
    lines = (ROOT / "requirements" / "engine-image.in").read_text().splitlines()
    named = {line for line in lines if line and not line.startswith("#")}
    assert wanted <= named
    by_name = {
        "httptools",
        "accelerate",
        "bitsandbytes",
    }  # uvicorn's HTTP parser, transformers' loading and quantization
    assert named - wanted <= by_name


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_the_images_versions_are_those_that_are_tested(build: str) -> None:
    def versions(name: str) -> dict[str, str]:
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        return dict(re.findall(r"^([a-z0-9.-]+)==([^\s+]+)", text, re.MULTILINE))

    tested = versions("gateway") | versions("engine")
    image = versions(f"engine-{build}")
    cuda = {name for name in image if re.match(r"nvidia|cuda|triton", name)}
    assert {n: v for n, v in image.items() if n not in cuda} == {n: tested[n] for n in image if n not in cuda}
    assert bool(cuda) == (build == "cuda")
    text = (ROOT / "requirements" / f"engine-{build}.txt").read_text()
    blocks = re.split(r"^(?=[a-z])", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(image) and all("--hash=sha256:" in block for block in blocks)
