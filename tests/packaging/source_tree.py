"""Where the project is, and a copy of it to build from."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "src")
CPU = Path("src/keelnorm/engine/kernels/cpu")


@dataclass
class Tree:
    """A copy of the project.

    Args:
        path: where it is
        programs: the only folder in which its builds find programs; empty at first
        out: where its wheels go
    """

    path: Path
    programs: Path
    out: Path

    def build(self, hook: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Call a hook of the build back end, as pip does, and with an environment that has no compiler in it."""
        kept = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX", "KEELNORM_NATIVE")}
        code = f"import sys, setuptools.build_meta as back_end; print(back_end.{hook}(sys.argv[1]))"
        return subprocess.run(
            [sys.executable, "-c", code, str(self.out)],
            cwd=self.path,
            env={**kept, "PATH": str(self.programs), **environment},
            capture_output=True,
            text=True,
        )

    def built(self) -> Path:
        """The one file that the builds have made."""
        [path] = self.out.iterdir()
        return path
