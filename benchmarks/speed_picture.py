"""Draws docs/images/speed.svg, the picture of the README, from the first table of docs/figures.md.

python benchmarks/speed_picture.py
"""

from __future__ import annotations

import math
import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
SOURCE, PICTURE = DOCS / "figures.md", DOCS / "images/speed.svg"
LAYOUTS = ("contiguous", "channels-last")
LEFT, TOP, UNIT, ROW = 320, 84, 118, 54
"""Where bars begin, and the pixels of a factor of two and of a row."""
TICKS = (1, 2, 4, 8, 16)

STYLE = """\
.page { fill: #ffffff; stroke: #d0d7de; }
text { fill: #1f2328; }
.small { fill: #4b5563; font-size: 13px; }
.head { font-size: 17px; font-weight: 600; }
.grid { stroke: #d0d7de; }
.contiguous { fill: #2f6fc4; }
.channels-last { fill: #c2691c; }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117; stroke: #30363d; }
  text { fill: #e6edf3; }
  .small { fill: #adb6c0; }
  .grid { stroke: #30363d; }
  .contiguous { fill: #6ba4f0; }
  .channels-last { fill: #e2954f; }
}"""


def rows() -> list[tuple[str, tuple[float, float]]]:
    """The rows of the table: what is compared, and how many times faster it is in each layout."""
    table = SOURCE.read_text(encoding="utf-8").partition("| times faster than eager")[2].partition("\n\n")[0]
    found = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \|$", table, re.MULTILINE)
    return [(label, (float(first), float(second))) for label, first, second in found]


def drawn() -> str:
    """The picture as SVG."""
    data = rows()
    bottom = TOP + ROW * len(data)
    width, height = LEFT + UNIT * int(math.log2(TICKS[-1])) + 60, bottom + 62
    parts = [f'<rect class="page" x="1" y="1" width="{width - 2}" height="{height - 2}" rx="10"/>']
    parts.append('<text class="head" x="24" y="36">Times faster than torch.nn</text>')
    for index, layout in enumerate(LAYOUTS):
        x = LEFT + 150 * index
        parts.append(f'<rect class="{layout}" x="{x}" y="51" width="12" height="12" rx="2"/>')
        parts.append(f'<text class="small" x="{x + 18}" y="62">{layout}</text>')
    for tick in TICKS:
        at = LEFT + UNIT * math.log2(tick)
        parts.append(f'<line class="grid" x1="{at:g}" y1="{TOP}" x2="{at:g}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{at:g}" y="{bottom + 18}" text-anchor="middle">{tick}×</text>')
    for number, (label, values) in enumerate(data):
        y = TOP + ROW * number + 8
        parts.append(f'<text x="{LEFT - 14}" y="{y + 24}" text-anchor="end">{label}</text>')
        for index, (layout, value) in enumerate(zip(LAYOUTS, values, strict=True)):
            size = UNIT * math.log2(value)
            top = y + 20 * index
            parts.append(f'<rect class="{layout}" x="{LEFT}" y="{top}" width="{size:.1f}" height="17" rx="2"/>')
            parts.append(f'<text class="small" x="{LEFT + size + 6:.1f}" y="{top + 13}">{value:g}</text>')
    note = "Geometric means over ResNet-50’s shapes at batch 32, two cores, AVX-512; logarithmic. docs/figures.md"
    parts.append(f'<text class="small" x="24" y="{height - 16}">{note}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="14" role="img" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\">"
    )
    return "\n".join([head, f"<style>\n{STYLE}\n</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
