"""``python -m tensornet_compress``: the command line."""

from tensornet_compress.cli.__main__ import run

if __name__ == "__main__":
    run()
