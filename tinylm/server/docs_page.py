"""GET /docs: the routes and their fields as one page, which loads nothing from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; font-size: 1.15rem } h2 code { font-size: 1rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
td, th { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884 }
"""
_LIMITS = {
    "minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "minItems": "items ≥",
    "maxItems": "items ≤", "minLength": "characters ≥", "maxLength": "characters ≤",
}  # fmt: skip
_LARGEST_SHOWN = 1 << 32


def docs_page(api: dict[str, Any]) -> str:
    """HTML of an OpenAPI description: its routes, and each body's fields with type, limits and meaning."""
    parts = [f"<h1>{escape(api['info']['title'])} {escape(api['info']['version'])}</h1>"]
    parts.append("<p>The same for programs: <a href='openapi.json'>openapi.json</a>.</p>")
    schemas = api.get("components", {}).get("schemas", {})
    for path, methods in api["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(route['description'])}</p>")
            body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                parts.append(_table(_resolved(body, schemas), schemas))
    head = f"<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>tinylm</title>{_style()}"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>"


def _style() -> str:
    return f"<style>{STYLE}</style>"


def _table(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}</td>"
        f"<td>{escape(_type(field, schemas))}</td><td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in schema["properties"].items()
        if field.get("type") != "null"
    ]
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{''.join(rows)}</table>"


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _type(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A type in words; an object by the names of its fields."""
    schema = _resolved(schema, schemas)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        words = [_type(option, schemas) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return ", ".join(map(repr, schema["enum"]))
    kind = schema.get("type", "anything")
    limits = [
        f"{sign} {schema[key]}" for key, sign in _LIMITS.items() if abs(schema.get(key, 1 << 63)) < _LARGEST_SHOWN
    ]
    if kind == "array":
        kind = f"list of {_type(schema.get('items', {}), schemas)}"
    if names := [name for name, field in schema.get("properties", {}).items() if field.get("type") != "null"]:
        kind = f"{{{', '.join(names)}}}"
    return f"{kind} ({', '.join(limits)})" if limits else kind
