"""Lints the Dockerfile, and runs its steps, without Docker.

usage: docker_steps.py CHECKOUT TARGET_DIR WHEELHOUSE FOLDER [--roots BASE [--target NAME]]

Each stage has a folder below FOLDER for its root. Without --roots, steps run in a plain shell: /out is a folder of the stage, the working
folder of the build is the checkout itself, whatever TARGET_DIR has is not compiled again, pip finds in WHEELHOUSE what the lock files
name, steps without network have none of cargo's and pip's, and those that change the system are left out.

With --roots (as root, on Linux) nothing is replaced or left out: each stage is an overlay that steps see as /. The first image is this
machine; BASE is a folder with what is in the second one, as `debootstrap --variant=minbase bookworm BASE` makes it. Steps without network
have none.
"""

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
for name in ("checkout", "target_dir", "wheelhouse", "folder"):
    parser.add_argument(name, type=Path)
parser.add_argument("--roots", type=Path, metavar="BASE")
parser.add_argument("--target", default="cpu")
asked = parser.parse_args()
if asked.roots:
    # Mounts end with the process. An overlay's layers must not lie within each other, so those of the stages are on a file system of theirs.
    if not os.environ.get("IN_MOUNTS_OF_ITS_OWN"):
        again = ["unshare", "--mount", sys.executable, *sys.argv]
        os.execvpe(again[0], again, os.environ | {"IN_MOUNTS_OF_ITS_OWN": "1"})
    (asked.folder / "stages").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", asked.folder / "stages"], check=True)
DOCKERFILE = asked.checkout / "pipelines/docker/Dockerfile"
TAKEN_IN = "docker.io/library/"  # the images that the stages begin with, in order: for building, for running
SYSTEM = re.compile(r"\b(apt-get|useradd)\b")


def instructions(text):
    """The instructions of a Dockerfile: their names and all that follows."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for logical in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        name, rest = logical.split(None, 1)
        yield name, rest.strip()


def context():
    """The files that Docker is sent, by the patterns of the .dockerignore file: the last that matches decides."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=asked.checkout, text=True, capture_output=True, check=True
    ).stdout.splitlines()
    patterns = [line for line in Path(f"{DOCKERFILE}.dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def matches(path, pattern):
        wanted, parts = pattern.split("/"), path.split("/")
        return len(parts) >= len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))

    def is_sent(path):
        sent = True
        for pattern in patterns:
            if matches(path, pattern.removeprefix("!")):
                sent = pattern.startswith("!")
        return sent

    return [path for path in listed if is_sent(path) and (asked.checkout / path).is_file()]


class Stage:
    """A stage as far as it has come."""

    def __init__(self, name, before, image):
        self.name, self.root = name, asked.folder / "stages" / name
        self.before, self.image = before, image
        self.variables = dict(before.variables) if before else {}
        self.config = dict(before.config) if before else {}
        self.workdir = before.workdir if before else "/"
        if asked.roots:
            below = before.lower() if before else ["/" if image == "RUST_IMAGE" else str(asked.roots)]
            self.layers = [str(self.root / "upper"), *below]
            for part in ("upper", "work", "seen"):
                (self.root / part).mkdir(parents=True)
        elif before:
            shutil.copytree(before.root, self.root, symlinks=True, copy_function=os.link)
        else:
            self.root.mkdir(parents=True)

    def lower(self):
        return self.layers

    def at(self, path):
        """Where an absolute path of this stage lies, to be written to."""
        return (self.root / "upper" if asked.roots else self.root) / path.lstrip("/")

    def found(self, path):
        """Where an absolute path of this stage lies, in this layer, one below, or (certificates) on this machine."""
        layers = self.layers if asked.roots else [str(self.root), "/"]
        return next(place for place in (Path(layer) / path.lstrip("/") for layer in layers) if place.exists())

    def run(self, command):
        flags, command = re.fullmatch(r"((?:--\S+\s+)*)(.*)", command, re.S).groups()
        is_offline = "--network=none" in flags
        cache = re.search(r"--mount=type=cache,target=(\S+)", flags)
        if asked.roots:
            self.run_in_root(command, is_offline, cache and cache[1])
        elif SYSTEM.search(command):
            print(f"{self.name}: left out: {command}")
        else:
            self.run_in_shell(command, is_offline)

    def run_in_shell(self, command, is_offline):
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("CARGO_", "MAKE", "ORT_", "PIP_"))}
        path = f"{self.at('/usr/local/bin')}:{variables['PATH']}"
        variables |= self.variables | {"PATH": path, "CARGO_TARGET_DIR": str(target_dir), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        variables |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(asked.wheelhouse)}
        if is_offline:
            variables |= {"CARGO_NET_OFFLINE": "true", "PIP_FIND_LINKS": ""}
        folder = asked.checkout if self.workdir == "/src" else self.at(self.workdir)
        self.check(["/bin/sh", "-c", re.sub(r"(?<![\w/])/out\b", str(self.at("/out")), command)], cwd=folder, env=variables)

    def run_in_root(self, command, is_offline, cache):
        seen = self.root / "seen"
        layers = f"lowerdir={':'.join(self.layers[1:])},upperdir={self.layers[0]},workdir={self.root / 'work'}"
        mounts = [f"mount -t overlay overlay -o {layers} {seen}", f"mount --bind /dev {seen}/dev", f"mount -t proc proc {seen}/proc"]
        if cache:
            mounts += [f"mkdir -p {seen}{cache}", f"mount --bind {asked.target_dir} {seen}{cache}"]
        user = self.config.get("USER")
        within = ["chroot", *([f"--userspec={user}"] if user else []), str(seen), "/bin/sh", "-c", f"cd {self.workdir} && {command}"]
        script = " && ".join([*mounts, f"exec {shlex.join((['unshare', '--net'] if is_offline else []) + within)}"])
        path = "/root/.cargo/bin:/root/.pyenv/shims:" if self.image == "RUST_IMAGE" else ""
        variables = {"PATH": f"{path}/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root" if not user else "/tmp"}
        certificates = {name: value for name, value in os.environ.items() if name.endswith(("CA_BUNDLE", "CERT_FILE", "_CERT"))}
        self.check(["unshare", "--mount", "--pid", "--fork", "sh", "-c", script], env=variables | certificates | self.variables)

    def check(self, command, **where):
        print(f"{self.name}: {command[-1]}", flush=True)
        ran = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **where)
        print(ran.stdout, flush=True)
        if ran.returncode != 0:
            sys.exit(f"the step gave {ran.returncode}")

    def copy(self, words, stages):
        froms = [word for word in words if word.startswith("--from=")]
        *sources, target = [word for word in words if not word.startswith("--")]
        if not froms:
            assert sources == ["."] and target == ".", words
            sent = self.at(self.workdir) if asked.roots else asked.folder / "sent"
            for path in context():
                (sent / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(asked.checkout / path, sent / path)
            check_context(sent)
            return
        stage = stages[froms[0].removeprefix("--from=")]
        for source in sources:
            place, to = stage.found(source), self.at(target)
            to.parent.mkdir(parents=True, exist_ok=True)
            if place.is_dir():
                shutil.copytree(place, to, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(place, to)


def check_context(sent):
    """What is sent is enough for cargo, and not more than the program is built of."""
    told = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--offline", "--format-version", "1"], cwd=sent, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    (package,) = json.loads(told.stdout)["packages"]
    targets = [Path(target["src_path"]) for target in package["targets"]]
    assert targets and all(target.is_file() for target in targets), targets
    paths = {str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()}
    sources = {path for path in subprocess.check_output(["git", "ls-files", "src"], cwd=asked.checkout, text=True).split()}
    assert sources <= paths, sources - paths
    assert {"Cargo.lock", "Makefile", "pyproject.toml", "README.md", "LICENSE-MIT"} <= paths, paths
    assert not any(path.startswith((".", "target", "models", "tests/python", "fuzz")) for path in paths), paths


def substituted(text, variables):
    return re.sub(r"\$\{?(\w+)\}?", lambda name: variables.get(name[1], name[0]), text)


# Maturin takes the program away for a moment, which other tests run: it gets links to all that is there.
target_dir = asked.folder / "target"
if not asked.roots:
    shutil.copytree(asked.target_dir / "release", target_dir / "release", symlinks=True, copy_function=os.link)

lint = subprocess.run([Path(sys.executable).parent / "hadolint", "--no-color", DOCKERFILE], capture_output=True, text=True)
assert lint.returncode == 0, lint.stdout + lint.stderr

defaults, stages, written = {}, {}, list(instructions(DOCKERFILE.read_text()))
names = [re.fullmatch(r"(\S+) AS (\S+)", rest).groups() for name, rest in written if name == "FROM"]
before = dict((name, base) for base, name in names)
wanted, reachable = [asked.target], set()
copied = {}
for name, rest in written:
    if name == "FROM":
        current = rest.split()[-1]
    elif name == "COPY" and "--from=" in rest:
        copied.setdefault(current, []).append(re.search(r"--from=(\S+)", rest)[1])
while wanted:
    stage = wanted.pop()
    if stage not in reachable and stage in before:
        reachable.add(stage)
        wanted += [before[stage], *copied.get(stage, [])]
# What docker builds where no target is named.
assert names[-1][1] == "cpu"

stage = None
for name, rest in written:
    if name == "FROM":
        base, title = rest.split(" AS ")
        stage = Stage(title, stages.get(base), base.strip("${}") if base not in stages else stages[base].image) if title in reachable else None
        stages[title] = stage
        continue
    if name == "ARG" and not stages:
        key, value = rest.split("=", 1)
        defaults[key] = value
        # An image of a tag that says exactly which, from the registry that everybody has.
        assert re.fullmatch(rf"{TAKEN_IN}(rust:\d+\.\d+\.\d+|debian:\d+\.\d+)-slim(-bookworm)?", value), value
    if stage is None:
        continue
    if name == "RUN":
        stage.run(rest)
    elif name == "COPY":
        stage.copy(rest.split(), stages)
    elif name == "WORKDIR":
        stage.workdir = rest
        stage.at(rest).mkdir(parents=True, exist_ok=True)
    elif name in ("ARG", "ENV"):
        stage.variables |= dict(pair.split("=", 1) for pair in shlex.split(rest) if "=" in pair)
    elif name == "LABEL":
        labels = dict(pair.split("=", 1) for pair in shlex.split(substituted(rest, stage.variables)))
        stage.config["LABEL"] = stage.config.get("LABEL", {}) | labels
    else:
        assert name in ("USER", "ENTRYPOINT", "CMD"), name
        stage.config[name] = json.loads(rest) if rest.startswith("[") else rest

final = stages[asked.target]
uid = final.config["USER"].split(":")[0]
assert uid.isdigit() and int(uid) > 0, final.config
assert final.config["ENTRYPOINT"] == ["lookalike"], final.config
assert final.config["LABEL"]["org.opencontainers.image.licenses"] == "MIT OR Apache-2.0", final.config
assert final.variables["VERSION"] == "unknown", final.variables

# What the image has beside its base: the program and what belongs to it, and the libraries with their licenses.
usr = final.at("/usr/local") if not asked.roots else None
if usr is None:
    usr = asked.folder / "image"
    for layer in reversed(final.layers[:2]):
        shutil.copytree(Path(layer) / "usr/local", usr, symlinks=True, dirs_exist_ok=True)
paths = {str(path.relative_to(usr)) for path in usr.rglob("*") if not path.is_dir()}
packages = "lib/python3/site-packages"
needed = ("bin/lookalike", "share/man/man1/lookalike.1", "share/bash-completion/completions/lookalike")
for path in (*needed, f"{packages}/onnxruntime/LICENSE"):
    assert path in paths, paths
other = {path for path in paths if not path.startswith(("bin/", "share/", packages))}
assert all(path.split("/")[3].startswith("lookalike-") for path in other), other
assert not any(path.endswith(".py") or "pybind" in path for path in paths), paths

# The program of the image, with nothing else set.
if asked.roots:
    final.config["USER"] = f"{uid}:{uid}"
    final.run("lookalike --version && lookalike run --help >/tmp/help && id -u && test -r /etc/ssl/certs/ca-certificates.crt")
else:
    told = subprocess.run([usr / "bin/lookalike", "--version"], cwd=asked.folder, env={}, capture_output=True, text=True).stdout
    assert f"from {usr / packages / 'onnxruntime/capi'}/libonnxruntime." in told, told
size = sum((usr / path).lstat().st_size for path in paths)
print(f"{asked.target}: {len(paths)} files, {size / 1e6:.0f} MB on top of {defaults['BASE_IMAGE']}")
