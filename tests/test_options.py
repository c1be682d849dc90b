"""Options made from settings classes: every key is one, with help, a panel and a way to write its value."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import typer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from typer.testing import CliRunner

from specx import SpecxError
from specx.cli import COMMANDS, STORE_COMMANDS, app
from specx.commands import Command, from_settings
from specx.config import ConfigError, Option, RunConfig, keys_of, load_config
from specx.extract.config import ExtractConfig, PlanConfig
from specx.extract.regenerate.config import RegenerateConfig
from specx.report.config import ReportConfig
from specx.storage.ops.config import GcConfig, InfoConfig, MergeConfig, PruneConfig, SelectConfig, VerifyConfig
from specx.train.config import TrainConfig
from specx.train.evaluate.config import EvaluateConfig
from specx.train.export.config import ExportConfig, RopeCheckConfig

SETTINGS: dict[str, type[RunConfig]] = {
    "extract": ExtractConfig,
    "regenerate": RegenerateConfig,
    "train": TrainConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "rope-check": RopeCheckConfig,
    "report": ReportConfig,
    "store info": InfoConfig,
    "store verify": VerifyConfig,
    "store select": SelectConfig,
    "store merge": MergeConfig,
    "store prune": PruneConfig,
    "store gc": GcConfig,
    "store plan": PlanConfig,
}
OF_COMMANDS = {"config", "as_json", "help"}
BUILT = {name: command.build() for name, command in COMMANDS.items()} | {
    f"store {name}": command.build() for name, command in STORE_COMMANDS.items()
}


class Chain(BaseModel):
    """A draft that proposes a token at a time."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    method: Literal["chain"] = "chain"
    """Kind of draft: chain proposes a token at a time."""
    steps: int = Field(default=4, ge=1)
    """Unrolled steps."""
    loss: Literal["ce", "kl"] = "ce"
    """Loss of the draft."""


class Tree(BaseModel):
    """A draft that proposes a tree."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    method: Literal["tree"] = "tree"
    """Or tree, a tree of them."""
    width: int | None = None
    """Widest level."""
    loss: Literal["ce", "tv"] | dict[str, float] = "tv"
    """Loss of the draft."""

    @model_validator(mode="after")
    def _narrow(self) -> "Tree":
        if self.width == 13:
            raise ValueError("width 13 brings bad luck")
        return self


class DataKeys(RunConfig):
    """What is read."""

    panel: ClassVar[str] = "Data"

    files: Annotated[tuple[Path, ...], Option(name="file")] = ()
    """Files to read. May be repeated."""
    part: Annotated[tuple[int, int] | None, Option(is_text=True, metavar="I/N")] = None
    """Share of them."""


class ToyConfig(DataKeys):
    """Flat keys over a nested draft, as run files and options have them."""

    panel: ClassVar[str] = "Run"

    out: Annotated[str, Option(is_argument=True)]
    """Directory to write."""
    layers: tuple[int, ...] | None = None
    """Layers to keep."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of the optimizer, such as [beta1,beta2]."""
    names: tuple[Literal["a,b", "c"], ...] = ()
    """Names, one of which has a comma."""
    more: dict[str, Any] = Field(default_factory=dict)
    """Anything else."""
    is_quick: bool = True
    """Whether to hurry."""
    draft: Annotated[Chain | Tree, Field(discriminator="method")]

    @classmethod
    def keys(cls, settings: Mapping[str, Any]) -> list[str]:
        other = "steps" if settings.get("method") == "tree" else "width"
        return [key for key in super().keys(settings) if key != other]

    @model_validator(mode="before")
    @classmethod
    def _nest(cls, values: Any) -> Any:
        keys = {"method", "steps", "width", "loss"}
        draft = {"method": "chain"} | {key: value for key, value in values.items() if key in keys}
        return {key: value for key, value in values.items() if key not in keys} | {"draft": draft}


class ErrorConfig(RunConfig):
    """A key of which no option can be made."""

    odd: set[int] = Field(default_factory=set)
    """A set."""


SEEN: list[ToyConfig] = []


def record(settings: ToyConfig) -> dict[str, int]:
    SEEN.append(settings)
    return {"calls": len(SEEN)}


def forecast(settings: ToyConfig) -> dict[str, str]:
    return {"forecast": settings.out}


def refuse(settings: ToyConfig, summary: dict[str, int]) -> None:
    if settings.out == "bad":
        raise SpecxError(f"{settings.out}: refused after {len(summary)} line")


def toy_app() -> typer.Typer:
    command = Command(
        "tests.test_options:ToyConfig",
        "tests.test_options:record",
        "Toy.",
        check="tests.test_options:refuse",
        instead={"dry_run": ("tests.test_options:forecast", "Only a forecast.")},
    )
    toy = typer.Typer()
    toy.command()(from_settings(ToyConfig, command))
    return toy


def run_toy(*arguments: object) -> Any:
    from specx.tests import test_options

    test_options.SEEN.clear()
    return CliRunner().invoke(toy_app(), [str(each) for each in arguments])


def settings_of(*arguments: object) -> Any:
    """Return the settings that the function of a command is called with."""
    from specx.tests import test_options

    result = run_toy(*arguments)
    assert result.exit_code == 0, result.output
    (found,) = test_options.SEEN
    return found


def test_every_command_has_its_settings_class_here() -> None:
    group: Any = typer.main.get_command(app)
    names = {name for name in group.commands if name != "store"}
    assert names | {f"store {name}" for name in group.commands["store"].commands} == set(SETTINGS) == set(BUILT)


@pytest.mark.parametrize("command", SETTINGS)
def test_every_key_is_one_option_with_help(command: str) -> None:
    kind, parameters = SETTINGS[command], BUILT[command].params
    names = [parameter.name for parameter in parameters]
    of_command = OF_COMMANDS | ({"dry_run"} if command == "train" else set())
    assert len(names) == len(set(names))
    assert set(names) - of_command == set(keys_of(kind))
    spelled = [flag for parameter in parameters for flag in [*parameter.opts, *parameter.secondary_opts]]
    assert len(spelled) == len(set(spelled))
    texts = {str(parameter.name): str(getattr(parameter, "help", "")) for parameter in parameters}
    for name, key in keys_of(kind).items():
        for field in key.fields.values():
            assert field.description, name
            start = " ".join(field.description.replace("``", "`").replace("[", "").split())[:20]
            assert texts[name].replace("\\[", "").replace("[", "").startswith(start), name


def test_inherited_fields_keep_their_docstrings() -> None:
    for kind in (ExtractConfig, PlanConfig, RegenerateConfig):
        assert kind.model_fields["tensor_parallel"].description == "GPUs of one vLLM engine that share each layer."
    described = PlanConfig.model_fields["data"].description
    assert described is not None
    assert described.startswith("Data to extract")


@pytest.mark.parametrize(
    ("command", "panels"),
    [
        ("extract", {"Input and output", "Data", "Prompt", "Stored features", "Engine", "Cluster"}),
        ("regenerate", {"Input and output", "Data", "Prompt", "Sampling", "Engine"}),
        ("evaluate", {"Input and output", "Prompts", "Decoding", "Engine"}),
    ],
)
def test_help_shows_the_panels(command: str, panels: set[str]) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "120"})
    headings = {line.split("─")[1].strip() for line in result.output.splitlines() if line.startswith("╭─")}
    assert headings == panels | {"Options"}


def test_help_shows_docstring_default_and_what_is_required() -> None:
    text = " ".join(CliRunner().invoke(toy_app(), ["--help"], env={"COLUMNS": "160"}).output.split())
    for expected in (
        "Directory to write. (required)",
        "Of the optimizer, such as [beta1,beta2]. (default: 0.9,0.95)",
        "--is-quick --no-is-quick",
        "Whether to hurry. (default: on)",
        "--file TEXT Files to read. May be repeated.",
        "I/N Share of them.",
        "Unrolled steps. (default: 4)",
        "Loss of the draft. One of ce, kl, tv. (default: ce for chain, tv for tree)",
        "Kind of draft: chain proposes a token at a time. Or tree, a tree of them.",
        "--dry-run Only a forecast.",
    ):
        assert expected in text
    assert "for chain, tree for tree" not in text


def test_panel_of_a_key_is_that_of_the_class_that_declares_it() -> None:
    panels = {name: key.panel for name, key in keys_of(ToyConfig).items()}
    assert (panels["out"], panels["files"]) == ("Run", "Data")
    assert (panels["method"], panels["loss"]) == ("Draft", "Draft")
    assert (panels["steps"], panels["width"]) == ("Draft: chain", "Draft: tree")
    assert "draft" not in panels


def test_keys_come_in_the_order_of_their_classes() -> None:
    expected = ["out", "layers", "betas", "names", "more", "is_quick", "method", "steps", "loss", "width"]
    assert list(keys_of(ToyConfig)) == [*expected, "files", "part"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--layers", "2,12,21"], {"layers": (2, 12, 21)}),
        (["--layers", "2", "--layers", "12,21"], {"layers": (2, 12, 21)}),
        (["--betas", "0.5,0.75"], {"betas": (0.5, 0.75)}),
        (["--file", "a,b", "--file", "c"], {"files": (Path("a,b"), Path("c"))}),
        (["--names", "a,b", "--names", "c"], {"names": ("a,b", "c")}),
        (["--more", "a=1", "--more", "b=true,c=x"], {"more": {"a": 1, "b": True, "c": "x"}}),
        (["--more", 'deep={"x": 1, "y": [2, 3]}'], {"more": {"deep": {"x": 1, "y": [2, 3]}}}),
        (["--more", "url=http://h:1/?a=b"], {"more": {"url": "http://h:1/?a=b"}}),
        (["--no-is-quick"], {"is_quick": False}),
        (["--steps", "7"], {"draft": Chain(steps=7)}),
        (["--loss", "kl"], {"draft": Chain(loss="kl")}),
        (["--method", "tree", "--width", "3"], {"draft": Tree(width=3)}),
        (["--method", "tree", "--loss", "ce=0.1,tv=0.9"], {"draft": Tree(loss={"ce": 0.1, "tv": 0.9})}),
        (["--method", "tree", "--loss", "ce"], {"draft": Tree(loss="ce")}),
        ([], {"draft": Chain(), "layers": None, "more": {}, "is_quick": True}),
    ],
    ids=str,
)
def test_options_become_settings(arguments: list[str], expected: dict[str, Any]) -> None:
    found = settings_of("o", *arguments)
    # The classes of another import of this file are equal by their content only.
    shown = {key: value.model_dump() if isinstance(value, BaseModel) else value for key, value in expected.items()}
    assert {key: found.model_dump()[key] for key in expected} == shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "1,two"], "'1,two': expected integers such as 2,12,21"),
        (["--betas", "x"], "'x': expected numbers such as 0.9,0.95"),
        (["--more", "a"], "'a': expected KEY=VALUE"),
        (["--more", "a=1", "--more", "=2"], "'=2': expected KEY=VALUE"),
        (["--more", "a=[1"], "'a=[1': the value is not YAML"),
        (["--method", "forest"], "'forest' is not one of 'chain', 'tree'"),
    ],
    ids=str,
)
def test_wrong_usage_is_refused_with_exit_code_2(arguments: list[str], message: str) -> None:
    result = run_toy("o", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_options_override_the_run_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("out: file\nsteps: 2\nloss: kl\nlayers: [1, 2]\n")
    found = settings_of("--config", path, "--steps", "3", "--layers", "4")
    assert (found.out, found.layers) == ("file", (4,))
    assert (found.draft.steps, found.draft.loss) == (3, "kl")


def test_a_flag_runs_something_else_instead() -> None:
    result = run_toy("o", "--dry-run", "--json")
    assert result.output.splitlines()[-1] == '{"forecast": "o"}'


def test_a_check_fails_after_the_summary_is_printed() -> None:
    result = run_toy("bad")
    assert (result.output, str(result.exception)) == ("calls  1\n", "bad: refused after 1 line")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "options: --steps (steps): Input should be greater than or equal to 1"),
        ({"betas": (0.5, "x")}, "options: --betas (betas.1): Input should be a valid number"),
        ({"method": "tree", "width": "wide"}, "options: --width (width): Input should be a valid integer"),
        ({"method": "tree", "width": 13}, "options: width 13 brings bad luck"),
        ({"method": "tree", "loss": {"ce": "much"}}, "options: --loss (loss"),
        ({"method": "forest"}, "options: --method (method): Input tag 'forest'"),
        (
            {"width": 3},
            "options: --width (width): unknown key; the keys are betas, files, is_quick, layers, loss, method, more, "
            "names, out, part, steps; width is a key of tree",
        ),
        ({"files": 3}, "options: --file (files): Input should be a valid tuple"),
        ({"out": 3}, "options: OUT (out): Input should be a valid string"),
        (
            {"stpes": 3},
            "options: stpes: unknown key; the keys are betas, files, is_quick, layers, loss, method, more, names, out, "
            "part, steps",
        ),
    ],
    ids=str,
)
def test_errors_name_option_and_flat_key(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ToyConfig, None, {"out": "o"} | settings)
    assert str(caught.value).startswith(message)


def test_errors_name_the_run_file_where_the_value_is_from_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 0\n")
    with pytest.raises(ConfigError, match=f"^{path}: steps: Input should be greater"):
        load_config(ToyConfig, path, {"out": "o", "layers": None, "steps": None})
    with pytest.raises(ConfigError, match=r"^options: --steps \(steps\): Input should be greater"):
        load_config(ToyConfig, path, {"out": "o", "steps": -1})


def test_a_key_of_which_no_option_can_be_made_is_refused_at_once() -> None:
    with pytest.raises(TypeError, match="odd: no option can be made of"):
        from_settings(ErrorConfig, COMMANDS["train"])
