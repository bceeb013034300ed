"""The command ``trt-kd``: thin commands, everything heavy imported inside them."""


def main() -> None:
    """Run the command line."""
    from trt_kd.cli.app import app

    app()
