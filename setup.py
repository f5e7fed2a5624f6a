"""Puts configs/ into the wheel, as steptool_jax/configs; all else stands in pyproject.toml."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class WithConfigs(build_py):
  def run(self):
    super().run()
    if not self.editable_mode:
      target = pathlib.Path(self.build_lib) / "steptool_jax" / "configs"
      target.mkdir(parents=True, exist_ok=True)
      for file in pathlib.Path(__file__).with_name("configs").glob("*.py"):
        shutil.copy(file, target)


setup(cmdclass={"build_py": WithConfigs})
