"""``python -m tensornet_compress.cli`` and the script ``tensornet-compress``: the command line."""

from tensornet_compress.cli.ending import ending


def run() -> None:
    """Entry point; the commands are imported inside, so that a signal during the slow imports is met too."""
    with ending():
        from tensornet_compress.cli.main import app

        app()


if __name__ == "__main__":
    run()
