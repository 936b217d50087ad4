"""Drawings as SVG: what a browser and a README show, written without a plotting library.

A drawing needs nothing but itself: no script, no font and no picture from elsewhere. It brings its own background, so
it reads the same on a light page and on a dark one. Texts are escaped; what XML cannot hold is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from tinylm.commandline.exit_status import CONTROL_CHARACTERS

PAPER, FRAME, GRID = "#ffffff", "#d0d7de", "#e6eaef"
INK, MUTED = "#1f2328", "#59636e"
BLUE, ORANGE, GREEN, RED = "#1f5fbf", "#d9590b", "#1a7f37", "#cf222e"
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', Helvetica, Arial, sans-serif"
_NOT_IN_XML = {**CONTROL_CHARACTERS, 0xFFFE: None, 0xFFFF: None, **dict.fromkeys(range(0xD800, 0xE000), "\ufffd")}


class Drawing:
    """An SVG of `width` x `height` pixels, which scales with the page.

    Args:
        title: read aloud by a screen reader, and shown when the mouse rests on the picture.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.height = height
        size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
        xmlns = "http://www.w3.org/2000/svg"
        self.root = ElementTree.Element("svg", {"xmlns": xmlns, **size, "font-family": FONTS, "role": "img"})
        self._add("title", title)
        self.box(0.5, 0.5, width - 1, height - 1, PAPER, rx=8, stroke=FRAME)

    def _add(self, tag: str, content: str | None = None, **attributes: Any) -> None:
        shown = {name.replace("_", "-"): _value(value) for name, value in attributes.items()}
        ElementTree.SubElement(self.root, tag, shown).text = content and content.translate(_NOT_IN_XML)

    def text(
        self, x: float, y: float, words: str, size: float = 12, color: str = INK, anchor: str = "start", **more: Any
    ) -> None:
        """Words on the base line `y`; `anchor` says which end of them is at `x`: start, middle or end."""
        self._add("text", words, x=x, y=y, font_size=size, fill=color, text_anchor=anchor, **more)

    def box(self, x: float, y: float, width: float, height: float, color: str, **more: Any) -> None:
        """A filled rectangle."""
        self._add("rect", x=x, y=y, width=width, height=height, fill=color, **more)

    def line(self, points: Sequence[tuple[float, float]], color: str, width: float = 1, **more: Any) -> None:
        """A line through all points."""
        corners = " ".join(f"{_value(x)},{_value(y)}" for x, y in points)
        self._add("polyline", points=corners, fill="none", stroke=color, stroke_width=width, **more)

    def dot(self, x: float, y: float, color: str, radius: float = 3, **more: Any) -> None:
        """A filled circle."""
        self._add("circle", cx=x, cy=y, r=radius, fill=color, **more)

    def to_bytes(self) -> bytes:
        """The file's content."""
        ElementTree.indent(self.root)
        return bytes(ElementTree.tostring(self.root, encoding="utf-8")) + b"\n"


def _value(value: Any) -> str:
    return f"{round(value, 2):g}" if isinstance(value, float) else str(value)
