"""``python -m tensornet_compress``: the command line."""

from tensornet_compress.cli.main import run

if __name__ == "__main__":
    run()
