"""The program of `contrastseg_jax/cli.py`; `python main.py` shows its usage."""

from contrastseg_jax.cli import run_program

if __name__ == "__main__":
    run_program()
