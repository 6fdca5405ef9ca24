"""`pkd`, and `python -m pkd_lightning`: a command of our own, which needs no Hydra, or the experiment of `run`."""

from pkd_lightning.commands import end_with_reader, run_command


def main() -> None:
    """Console entry point."""
    with end_with_reader():
        run_command()
        from pkd_lightning.run import main as run_experiment  # Hydra takes half a second

        run_experiment()


if __name__ == "__main__":
    main()
