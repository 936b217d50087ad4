"""Drawings are whole in themselves, and no text can break out of them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tinylm.evaluation.svg import PAPER, Drawing

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("<script>alert('&')</script>", "<script>alert('&')</script>"),
        ("größer & 大きい 🙂", "größer & 大きい 🙂"),
        ('"/><image href="http://x"/>', '"/><image href="http://x"/>'),
        ("a\x00\x1b[31mb\x85", "a[31mb"),
        ("half \ud83d a character \uffff", "half \ufffd a character "),
        ("]]> &amp;", "]]> &amp;"),
    ],
)
def test_any_text_is_shown_as_it_is(words, shown):
    drawing = Drawing(300, 100.5, words)
    drawing.text(10, 20.123, words)
    root = ElementTree.fromstring(drawing.to_bytes())
    assert [element.text for element in root] == [shown, None, shown], "title, background, text"
    assert {element.tag for element in root} == {f"{SVG}title", f"{SVG}rect", f"{SVG}text"}
    assert root[2].get("y") == "20.12" and root.get("viewBox") == "0 0 300 100.5"
    assert root[1].get("fill") == PAPER
    attributes = [(name, value) for element in root.iter() for name, value in element.items()]
    assert not [value for name, value in attributes if "href" in name or name.startswith("on") or "url(" in value]
