"""The house: small rooms, short import chains, and a draft family named nowhere but in its room."""

import ast
import re
import subprocess
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("extract", "storage", "train")
MOST_FILES = 10
MOST_LINES = 400

USER_FACING = {
    "extract/target.py": "The default is EAGLE-3's low, middle and high",
    "train/config.py": 'method="eagle3", ttt_steps=7',
}
"""Words that a user reads; no branch."""


def shipped() -> list[Path]:
    """Return the source files of the package, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-c", "-o", "--exclude-standard", "*.py", "*.c", "*.pyi"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    return [path for each in listed if (path := Path(each)).parts[0] not in ("tests", "setup.py")]


@pytest.mark.parametrize(("room", "longest_chain"), [("extract", 13), ("storage", 12), ("train", 10)])
def test_no_import_chain_of_a_room_is_longer_than_allowed(room: str, longest_chain: int) -> None:
    graph = grimp.build_graph("specx", exclude_type_checking_imports=True)
    root = f"specx.{room}"
    modules = {each for each in graph.modules if each.startswith(f"{root}.")}
    # Packages hold a docstring and import nothing.
    known: dict[str, list[str]] = {}

    def chain(module: str) -> list[str]:
        if module not in known:
            below = graph.find_modules_directly_imported_by(module) & modules
            known[module] = [module, *max(map(chain, below), key=len, default=[])]
        return known[module]

    longest = max(map(chain, sorted(modules)), key=len)
    assert len(longest) <= longest_chain, " -> ".join(longest)


def test_a_folder_holds_ten_files_at_most() -> None:
    count: dict[Path, int] = {}
    for path in shipped():
        if path.parts[0] in ROOMS:
            count[path.parent] = count.get(path.parent, 0) + 1
    assert len(count) > 20
    assert {str(folder): number for folder, number in count.items() if number > MOST_FILES} == {}


def test_no_file_is_longer_than_a_reader_s_patience() -> None:
    files = [*shipped(), *(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))]
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in files}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_file_has_the_name_of_a_package_that_it_imports() -> None:
    wrong = []
    for path in shipped():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            if path.stem in {name.partition(".")[0] for name in names}:
                wrong.append(str(path))
    assert wrong == []


def test_a_draft_family_is_named_in_its_room_and_nowhere_else() -> None:
    named = re.compile(r"eagle[-_]?[13]", re.IGNORECASE)
    outside = [path for path in shipped() if path.suffix == ".py" and path.parts[:2] != ("train", "families")]
    assert len(outside) > 100
    found = []
    for path in outside:
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1):
            if named.search(line) and not (path.as_posix() in USER_FACING and USER_FACING[path.as_posix()] in line):
                found.append(f"{path}:{number}: {line.strip()}")
    assert found == []
