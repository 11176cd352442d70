"""The Dockerfile, checked as text without Docker for what would break a build."""

import re
import shlex
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TARGETS = ["cpu", "gpu"]


@dataclass(frozen=True)
class Stage:
    base: str
    instructions: list[tuple[str, str]] = field(default_factory=list)
    """Pairs such as ("RUN", "pip check"), in order."""

    def arguments(self, instruction: str) -> list[str]:
        return [argument for name, argument in self.instructions if name == instruction]


def parse(text: str) -> dict[str, Stage]:
    """The named stages of a Dockerfile, with the defaults of its global ARGs filled into FROM."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    defaults: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        instruction, _, argument = line.partition(" ")
        if instruction == "FROM":
            base, _, name = argument.partition(" AS ")
            stage = Stage(re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], base))
            stages[name] = stage
        elif stage is None:
            assert instruction == "ARG", line
            name, _, default = argument.partition("=")
            defaults[name] = default
        else:
            stage.instructions.append((instruction, argument))
    return stages


def copied(stage: Stage) -> list[str]:
    """The sources of every COPY, relative to the repository root."""
    words = [shlex.split(argument) for argument in stage.arguments("COPY")]
    return [source for copy in words for source in copy[:-1] if not source.startswith("--")]


def installs(stage: Stage) -> list[list[str]]:
    commands = [command.strip() for run in stage.arguments("RUN") for command in run.split("&&")]
    return [shlex.split(command) for command in commands if command.startswith("pip install")]


def in_context(path: str) -> bool:
    """Whether .dockerignore includes a path: the last pattern that matches it or a parent decides."""
    parents = [path, *(str(parent) for parent in Path(path).parents)][:-1] or [path]
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            keep = pattern.startswith("!")
            if any(fnmatch(parent, pattern.removeprefix("!")) for parent in parents):
                kept = keep
    return kept


STAGES = parse((ROOT / "deploy" / "Dockerfile").read_text())


def test_targets() -> None:
    assert list(STAGES) == TARGETS


@pytest.mark.parametrize("target", TARGETS)
def test_base_image_has_the_pinned_ray(target: str) -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "deploy" / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned
    platform = {"cpu": "cpu", "gpu": r"cu\d{3}"}[target]
    assert re.fullmatch(rf"rayproject/ray:{re.escape(pinned[1])}-py311-{platform}", STAGES[target].base)


@pytest.mark.parametrize("target", TARGETS)
def test_copied_sources_exist_and_reach_the_build(target: str) -> None:
    sources = copied(STAGES[target])
    assert {"pyproject.toml", "actstore", "workers", "deploy/constraints.txt"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert in_context(source), f"{source} is in .dockerignore"


@pytest.mark.parametrize("target", TARGETS)
def test_every_install_is_constrained(target: str) -> None:
    commands = installs(STAGES[target])
    assert commands
    for command in commands:
        assert command[command.index("-c") + 1] == "deploy/constraints.txt"
    assert {".[all]", "ray[default]"} <= set(commands[-1])


def test_cpu_image_takes_only_torch_from_another_index() -> None:
    (command,) = (command for command in installs(STAGES["cpu"]) if "--index-url" in command)
    assert "--no-deps" in command
    assert command[-1] == "torch"
    assert STAGES["cpu"].arguments("ARG") == ["TORCH_INDEX=https://download.pytorch.org/whl/cpu"]


@pytest.mark.parametrize("target", TARGETS)
def test_user_is_a_number_other_than_root(target: str) -> None:
    """Kubernetes can hold an image to runAsNonRoot only if its user is a number."""
    assert int(STAGES[target].arguments("USER")[-1]) > 0


@pytest.mark.parametrize("target", TARGETS)
def test_usage_statistics_are_off(target: str) -> None:
    assert any("RAY_USAGE_STATS_ENABLED=0" in env.split() for env in STAGES[target].arguments("ENV"))


@pytest.mark.parametrize("path", [".env", ".git", ".venv", "tests", "deploy/kuberay", "actstore/__pycache__"])
def test_context_leaves_out(path: str) -> None:
    assert not in_context(path)
