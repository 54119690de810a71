"""`python -m phi4_mlx COMMAND`."""

from phi4_mlx.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
