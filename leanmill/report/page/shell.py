"""The file around a page: style, script, values, and the policy that lets nothing else run."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from html import escape
from importlib import resources
from typing import Any

from leanmill.core.redact import redact_tree


def document(title: str, body: str, values: Any, *, version: str) -> str:
    """Return the whole file.

    Args:
        title: Of the page; escaped here.
        body: HTML.
        values: What page.js reads: `charts`, `sites`, `heats`, `layers`.
        version: Of Leanmill, for the last line.
    """
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    script = resources.files(__package__).joinpath("page.js").read_text(encoding="utf-8")
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    # The policy lets only this script run and nothing be fetched, whatever a run's strings hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · Leanmill</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}"
        f"<footer>Written by Leanmill {escape(version)} on {written}.</footer>\n"
        f'<script type="application/json" id="values">{_json(redact_tree(values))}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
