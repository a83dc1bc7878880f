"""Builds the wheel of a checkout, installs it into an empty environment as pip does, uses it with nothing else set, and takes it away.

usage: wheel_installs.py CHECKOUT TARGET_DIR WHEELHOUSE FOLDER

TARGET_DIR is where cargo has built the program already: it must not be compiled again. WHEELHOUSE has what the wheel depends on.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from PIL import Image


def share(source: str, target: str) -> None:
    """What cargo writes anew, when it compiles, is shared; what it writes into, such as its notes of what is fresh, is copied with its time."""
    is_written_anew = Path(source).parent.name == "deps" and not source.endswith(".d")
    (os.link if is_written_anew else shutil.copy2)(source, target)


checkout, target_dir, wheelhouse, folder = map(Path, sys.argv[1:])
wheels, venv, home = folder / "wheels", folder / "venv", folder / "home"
home.mkdir(parents=True)


def run(*command, cwd=home, fails=False, **variables):
    """Runs a command, by default with a PATH and an empty home folder and no other variables; returns what it says."""
    variables = {"PATH": "/usr/bin:/bin", "HOME": str(home)} | variables
    ran = subprocess.run([str(word) for word in command], cwd=cwd, env=variables, capture_output=True, text=True)
    if (ran.returncode != 0) != fails:
        sys.exit(f"{command} gave {ran.returncode}\n{ran.stdout}\n{ran.stderr}")
    return ran.stdout + ran.stderr


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()}


# The wheel, out of the program that is there. Maturin takes the file away for a moment, which other tests run: it gets links to all.
shutil.copytree(target_dir / "release", folder / "target/release", symlinks=True, copy_function=share)
program = folder / "target/release/lookalike"
built_at = program.stat().st_mtime_ns
outside = {name: value for name, value in os.environ.items() if not name.startswith(("CARGO_", "MAKE", "ORT_", "VIRTUAL_ENV"))}
run("make", "wheel", f"WHEELS={wheels}", cwd=checkout, **(outside | {"CARGO_TARGET_DIR": str(folder / "target")}))
assert program.stat().st_mtime_ns == built_at, "the program was compiled again"
assert not (checkout / "lookalike.data").is_symlink()
(wheel,) = wheels.iterdir()
version = re.search(r'^version = "(.+)"', (checkout / "Cargo.toml").read_text(), re.M)[1]
# It runs wherever the C library is not older than that of the name, whatever Python is there.
assert re.fullmatch(rf"lookalike-{re.escape(version)}-py3-none-(manylinux_\d_\d+|macosx_\d+_\d+)_\w+\.whl", wheel.name), wheel.name
with zipfile.ZipFile(wheel) as archive:
    metadata = archive.read(f"lookalike-{version}.dist-info/METADATA").decode()
    # Of files of the same content, the bytes are the same whenever they were written.
    assert {file.date_time for file in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
assert {"LICENSE-APACHE", "LICENSE-MIT"} <= {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
assert "Requires-Dist: onnxruntime>=1.24" in metadata and "Provides-Extra: gpu" in metadata, metadata

# An empty environment, and pip with nothing but the wheel and what it depends on.
run(sys.executable, "-m", "venv", venv)
before = files(venv)
pip = [venv / "bin/python", "-m", "pip", "--disable-pip-version-check"]
said = run(*pip, "install", "--no-compile", "--no-index", "--find-links", wheelhouse, wheel)
assert re.search(r"Successfully installed .*lookalike-.*onnxruntime-", said), said
run(*pip, "check")
share = venv / "share"
pages = {path.name for path in (share / "man/man1").iterdir()}
assert {"lookalike.1", "lookalike-run.1", "lookalike-model-inspect.1"} <= pages, pages
assert run(venv / "bin/lookalike", "man").split()[:5] == (share / "man/man1/lookalike.1").read_text().split()[:5]
scripts = {
    "bash": "bash-completion/completions/lookalike",
    "zsh": "zsh/site-functions/_lookalike",
    "fish": "fish/vendor_completions.d/lookalike.fish",
}
for shell, name in scripts.items():
    assert (share / name).read_text() == run(venv / "bin/lookalike", "completions", shell), shell
# What bash makes of it.
asked = (
    f"source {share}/{scripts['bash']}; COMP_WORDS=(lookalike chec) COMP_CWORD=1;"
    " _lookalike lookalike chec lookalike; echo ${COMPREPLY[@]}"
)
assert run("bash", "--norc", "-c", asked).strip() == "check"

# It is called by its path, by a link to it, and by its name in an environment that is active; nothing else is set.
library = next((venv / "lib").glob("python3.*/site-packages/onnxruntime/capi/libonnxruntime.*"))
(folder / "bin").mkdir()
(folder / "bin/lookalike").symlink_to(venv / "bin/lookalike")
for called in (venv / "bin/lookalike", folder / "bin/lookalike"):
    told = run(called, "--version")
    assert f"from {library} (the program's Python environment)" in told, told
    assert told.startswith(f"lookalike {version}\n"), told
pictures = folder / "pictures"
pictures.mkdir()
for number in range(12):
    Image.radial_gradient("L").rotate(30 * number).resize((32, 24 + number)).save(pictures / f"{number}.png")
told = run(venv / "bin/lookalike", "run", "--images", pictures, "--out", folder / "tables")
assert "12 images in, 12 scored, 0 rejected" in told, told
for table in ("latents", "neighbors", "anomalies", "runs"):
    assert list((folder / "tables" / table / "_delta_log").glob("*.json")), table

# Without the library the program says where it looked, and how to get it.
run(*pip, "uninstall", "--yes", "onnxruntime")
assert "pip install onnxruntime" in run(venv / "bin/lookalike", "run", "--images", pictures, "--out", folder / "other", fails=True)

# Nothing is left.
run(*pip, "uninstall", "--yes", "lookalike", "numpy", "flatbuffers", "packaging", "protobuf")
left = files(venv) - before
assert not left, left
assert not files(home), files(home)
print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB")
