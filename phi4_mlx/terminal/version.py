"""The version of this package: setup.py, `--version`, the bridge and `phi4_mlx.__version__` all read it here."""

__version__ = "0.1.0"
