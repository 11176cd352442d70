"""The index of a dashboard: one table, sorted and searched in the browser, from compact JSON."""

import html
import json
from typing import Final

import numpy as np

from actstore.analysis.dashboards.feature_page import Pages
from actstore.analysis.dashboards.style import page

_TOKENS: Final = 4
"""Tokens of a feature in the table: those of its largest rows, each once."""

SCRIPT: Final = """
const data=JSON.parse(document.getElementById("data").textContent),rows=data.rows,shown=100;
const find=document.getElementById("find"),body=document.querySelector("tbody"),note=document.getElementById("note");
const texts=rows.map(r=>r[5].map(t=>data.tokens[t]).join("\\u0000").toLowerCase());
let column=0,falling=false,from=0;
function cell(tr,text,kind){const td=document.createElement("td");if(kind)td.className=kind;td.textContent=text;
tr.append(td);return td}
function show(){const wanted=find.value.toLowerCase();
const found=rows.map((_,i)=>i).filter(i=>!wanted||texts[i].includes(wanted)||String(rows[i][0])===wanted.trim());
const sign=falling?-1:1,key=i=>{const v=rows[i][column];return v===null?-Infinity:v};
found.sort((a,b)=>(key(a)<key(b)?-sign:key(a)>key(b)?sign:a-b));
if(from>=found.length)from=0;body.textContent="";
for(const i of found.slice(from,from+shown)){const r=rows[i],tr=document.createElement("tr");
const a=document.createElement("a");a.href=`features/${r[0]}.html`;a.textContent=r[0];cell(tr,"").append(a);
cell(tr,r[1]===null?"-":(100*r[1]).toPrecision(3)+" %");
for(const c of [2,3,4])cell(tr,r[c]===null?"-":c===4?r[c].toLocaleString("en"):r[c].toPrecision(3));
const td=cell(tr,"","l");for(const t of r[5]){const code=document.createElement("code");
code.textContent=data.tokens[t].replaceAll("\\n","↵");td.append(code," ")}body.append(tr)}
note.textContent=`${found.length?from+1:0} to ${Math.min(from+shown,found.length)} of ${found.length}`;
document.getElementById("back").disabled=!from;
document.getElementById("more").disabled=from+shown>=found.length;
document.querySelectorAll("th[data-c]").forEach(th=>th.setAttribute("aria-sort",
+th.dataset.c!==column?"none":falling?"descending":"ascending"))}
document.querySelectorAll("th[data-c]").forEach(th=>th.addEventListener("click",()=>{const c=+th.dataset.c;
falling=c===column?!falling:c!==0;column=c;from=0;show()}));
find.addEventListener("input",()=>{from=0;show()});
document.getElementById("back").addEventListener("click",()=>{from=Math.max(0,from-shown);show()});
document.getElementById("more").addEventListener("click",()=>{from+=shown;show()});
addEventListener("keydown",e=>{if(e.key==="/"&&document.activeElement!==find){e.preventDefault();find.focus()}});
show();
""".strip()


def index_page(pages: Pages, texts: dict[int, str], where: str) -> bytes:
    """The index.

    Args:
        pages: the pages that it leads to.
        texts: text of each token id.
        where: what the features are of.
    """
    of, tokens, rows = pages.statistics, dict[str, int](), []
    for feature, number in enumerate(pages.numbers.tolist()):
        best = dict.fromkeys(texts[token] for token in _largest_tokens(pages, feature))
        places = [tokens.setdefault(token, len(tokens)) for token in list(best)[:_TOKENS]]
        figures = [_rounded(of.density[feature]), _rounded(of.maximum[feature]), _rounded(of.mean[feature])]
        rows.append([number, *figures, int(of.n_active[feature]), places])
    data = json.dumps({"tokens": list(tokens), "rows": rows}, separators=(",", ":"))
    columns = ("feature", "density", "largest", "mean", "rows")
    head = "".join(
        f'<th data-c="{i}"><button type="button">{name}</button></th>' for i, name in enumerate(columns)
    )
    title = f"{len(pages.numbers):,} features of {of.hook}"
    body = (
        f"<h1>{html.escape(title)}</h1>\n<p><small>{html.escape(where)}</small></p>\n"
        '<p><label>Search tokens or a number: <input id="find" type="search"></label> '
        '<button id="back" type="button">back</button> <button id="more" type="button">more</button> '
        '<small id="note"></small> <small>key: /</small></p>\n'
        f'<table><thead><tr>{head}<th class="l">tokens of the largest rows</th></tr></thead><tbody></tbody></table>\n'
        "<noscript>The table needs JavaScript; the pages in the folder features do not.</noscript>"
    )
    return page(title, body, SCRIPT, data)


def _largest_tokens(pages: Pages, feature: int) -> list[int]:
    places = pages.examples.of(feature)
    part = slice(places.start, places.stop)
    is_largest = pages.examples.intervals[part] < 0
    ids: list[int] = pages.contexts.ids[part, pages.examples.before][is_largest].tolist()
    return ids


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else float(f"{value:.4g}")
