"""What all pages of a dashboard share: colours for light and dark, and a policy that lets a page load nothing."""

import base64
import hashlib
import html
from typing import Final

STYLE: Final = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#5c6672;--line:#d9dee4;--card:#f6f8fa;--link:#0b57a4;
--hot:247 144 9;--cold:64 132 214}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e4e8ec;--dim:#98a3af;--line:#333a42;--card:#1c2127;
--link:#7ab7ff;--hot:214 120 0;--cold:58 110 180}}
body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
a{color:var(--link)}h1{font-size:1.35rem;margin:.4rem 0}h2{font-size:1.05rem;margin:1.6rem 0 .4rem}
nav{display:flex;gap:1rem;flex-wrap:wrap}dl{display:flex;flex-wrap:wrap;gap:.4rem 2rem;margin:.6rem 0}
dt,small,th,caption,figcaption{color:var(--dim);font-size:.85rem;font-weight:400}dd{margin:0;font-variant-numeric:tabular-nums}
.c{display:flex;gap:.8rem;border-top:1px solid var(--line);padding:.25rem 0;margin:0}
.c small{flex:0 0 7.5rem;text-align:right;font-variant-numeric:tabular-nums}
.t{font:13px/1.6 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;min-width:0}
.t b{font-weight:400;background:rgb(var(--hot)/var(--a));border-radius:2px}.t .n{background:rgb(var(--cold)/var(--a))}
.t .p{outline:1.5px solid var(--fg)}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15rem .8rem .15rem 0;text-align:right}
td:first-child,th:first-child,.l{text-align:left}tbody tr{border-top:1px solid var(--line)}
.two{display:flex;flex-wrap:wrap;gap:.5rem 4rem}
svg{display:block;width:100%;max-width:40rem;height:9rem;background:var(--card)}
rect{fill:rgb(var(--hot))}.neg{fill:rgb(var(--cold))}code{font:13px ui-monospace,monospace;white-space:pre-wrap}
input,button{font:inherit;color:inherit;background:var(--card);
border:1px solid var(--line);border-radius:4px;padding:.2rem .5rem}
th button{border:0;background:none;color:var(--link);padding:0;cursor:pointer}
""".strip()


def page(title: str, body: str, script: str, data: str = "") -> bytes:
    """A page that loads nothing, and runs only this script.

    Args:
        title: text of the title.
        body: HTML of the body.
        script: JavaScript.
        data: JSON for the script, in the element with id ``data``.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    # In JSON, < stands in strings only; as an escape it cannot end the element.
    held = (
        f'<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>\n'
        if data
        else ""
    )
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n"
        f"{held}<script>{script}</script>\n</body></html>\n"
    )
    return text.encode("utf-8", "replace")


_SHOWN: Final = {code: chr(0x2400 + code) for code in range(32)} | {
    ord("\n"): "↵",
    ord("\t"): "⇥",
    127: "␡",
    # These would turn around the text that follows.
    **dict.fromkeys(
        [*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F], "\N{REPLACEMENT CHARACTER}"
    ),
}


def shown(token: str) -> str:
    """The text of a token as HTML: escaped, and with signs for what cannot be seen."""
    return html.escape(token.translate(_SHOWN), quote=True)


def number(value: float) -> str:
    """A number with three digits; ``-`` if there is none."""
    return "-" if value != value else f"{value:.3g}"
