"""Writes requirements.lock: the exact version of everything that seer-jax and all its extras install.

pip resolves without installing, so that the CUDA packages are locked on machines without a GPU too. The lock is used as
a constraints file: a line for a package that an installation does not need has no effect.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEADER = """\
# Exact versions for `pip install -c requirements.lock -e .[...]`, resolved on Linux, Python {}.{}.
# Made by `make lock`; do not edit.
"""


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ",".join(project["optional-dependencies"])
    resolve = ["install", "--dry-run", "--ignore-installed", "--quiet", "--only-binary=:all:", "--report=-"]
    command = [sys.executable, "-m", "pip", *resolve, f"{ROOT}[{extras}]"]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    packages = [entry["metadata"] for entry in json.loads(report)["install"]]
    pins = {p["name"].lower().replace("_", "-"): p["version"] for p in packages if p["name"] != project["name"]}
    lines = sorted(f"{name}=={version}\n" for name, version in pins.items())
    (ROOT / "requirements.lock").write_text(HEADER.format(*sys.version_info) + "".join(lines))
    print(f"requirements.lock: {len(lines)} packages")


if __name__ == "__main__":
    main()
