"""Pictures of a report for the README: its top at the widths of a desk and of a phone.

    python -m benchmarks.screenshots RESULT.json docs/images/report-weights [--desk light] [--phone dark] [--height 1400]

Writes PREFIX-1280.png and PREFIX-390.png, with few colours so that they stay small.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from PIL import Image

from tensornet_compress.report import read_result, write_report
from tests.report.chromium import browser, find_chromium

COLOURS = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("prefix", type=Path)
    parser.add_argument("--desk", choices=("light", "dark"), default="light")
    parser.add_argument("--phone", choices=("light", "dark"), default="dark")
    parser.add_argument("--height", type=int, default=1900)
    arguments = parser.parse_args()
    program = find_chromium()
    if program is None:
        raise SystemExit("no Chromium on this machine; apt-get install chromium chromium-driver")
    arguments.prefix.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, browser(program) as page:
        report = write_report(read_result(arguments.result), Path(folder) / "report.html")
        for width, scheme in ((1280, arguments.desk), (390, arguments.phone)):
            page.open(report, width, scheme, arguments.height)
            picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
            target = arguments.prefix.with_name(f"{arguments.prefix.name}-{width}.png")
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
            print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
