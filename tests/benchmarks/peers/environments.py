"""An environment of its own for each peer and for ours, from the package index.

torch comes first and alone, and a constraint keeps it: what a peer asks for besides may not replace it. Peers whose
declared dependencies cannot be met on a machine without a GPU, or that pin another torch, are installed without them,
and with those that their CPU path imports.

    python tests/benchmarks/peers/environments.py      # creates what is missing
"""

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[3]
ENVIRONMENTS = ROOT / ".peers"
TORCH = "torch==2.13.0"


@dataclass(frozen=True, kw_only=True)
class Project:
    """What is installed for one of those that are compared."""

    name: str
    package: str
    """As pip is told it: with the version where it comes from the index."""
    extras: tuple[str, ...] = ()
    """What is installed before the package."""
    with_dependencies: bool = False
    """Whether the package's own list of dependencies is followed."""

    @property
    def folder(self) -> Path:
        return ENVIRONMENTS / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"


OURS = Project(name="ours", package=f"--editable={ROOT}[train]", with_dependencies=True)
HUGGING_FACE = ("datasets==5.1.0", "safetensors==0.8.0", "numpy==2.3.5")
PEERS = (
    # torchvision and torchaudio, of which no CPU build fits this torch, are what its own list would add.
    Project(
        name="speculators",
        package="speculators==0.9.0",
        extras=(
            *HUGGING_FACE, "transformers==5.19.0", "hs-connectors==0.9.0", "aiohttp", "click", "httpx", "loguru",
            "openai", "protobuf", "psutil", "pydantic-settings", "rich", "typer",
        ),
    ),
    # It pins torch 2.11 and sglang, which exists for CUDA only; triton is imported, not used.
    Project(
        name="specforge",
        package="specforge==0.2.0",
        extras=(
            *HUGGING_FACE, "transformers==5.8.1", "accelerate", "openai-harmony", "pydantic", "psutil", "pyyaml",
            "requests", "tensorboard", "triton==3.9.0", "yunchang",
        ),
    ),
    Project(
        name="modelopt",
        package="nvidia-modelopt==0.47.0",
        extras=(*HUGGING_FACE, "transformers==5.8.1", "accelerate", "requests"),
        with_dependencies=True,
    ),
    # quack-kernels and megatron-fsdp are for CUDA only.
    Project(
        name="automodel",
        package="nemo-automodel==0.7.0",
        extras=(
            *HUGGING_FACE, "transformers==5.18.0", "pyyaml", "tiktoken", "torchao==0.18.0", "torchdata",
            "triton<3.8", "pillow",
        ),
    ),
)  # fmt: skip


def create(project: Project) -> str | None:
    """Create the environment of a project unless it is there; return what pip said if it could not."""
    done = project.folder / "installed"
    wanted = "\n".join((TORCH, *project.extras, project.package))
    if done.exists() and done.read_text() == wanted:
        return None
    venv.create(project.folder, with_pip=True, clear=True)
    constraints = project.folder / "constraints.txt"
    constraints.write_text(f"{TORCH}\n")
    own_list = [] if project.with_dependencies else ["--no-deps"]
    for arguments in ([TORCH], [*project.extras], [*own_list, project.package]):
        if not arguments:
            continue
        command = [str(project.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        found = subprocess.run(
            [*command, "-c", str(constraints), *arguments], capture_output=True, text=True, check=False
        )
        if found.returncode:
            lines = [line for line in found.stderr.splitlines() if line.startswith("ERROR")]
            return lines[-1] if lines else found.stderr[-400:]
    done.write_text(wanted)
    return None


def main() -> None:
    for project in (OURS, *PEERS):
        error = create(project)
        print(f"{project.name:12} {error or 'ready'}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
