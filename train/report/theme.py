"""The look of the page: the style sheet for light and dark schemes."""

from __future__ import annotations

from train.report.heatmap import DARK, LIGHT

PALETTE_LIGHT = ("#1f5fa8", "#c24f0c", "#0b7a66", "#7b4aa6", "#8a6d10", "#b0305c", "#51606f", "#2a8fb5")
PALETTE_DARK = ("#78b4f2", "#f29a55", "#55c4ad", "#c3a2ea", "#d9bb58", "#f08bac", "#a3b0bd", "#72cbe8")


def _colours(palette: tuple[str, ...]) -> str:
    return "".join(f"--c{number}:{colour};" for number, colour in enumerate(palette))


def _diverging(anchors: tuple[tuple[int, int, int], ...]) -> str:
    low, middle, high = (f"rgb({r},{g},{b})" for r, g, b in anchors)
    return f"--map:linear-gradient(90deg,{low},{middle},{high});"


def _token_levels() -> str:
    rules = ["".join(f".u{n}{{background:rgb(var(--under)/{0.16 * n:.2f})}}" for n in range(1, 5))]
    rules += [f".o{n}{{background:rgb(var(--over)/{0.16 * n:.2f})}}" for n in range(1, 5)]
    return "".join(rules) + ".o0{background:rgb(var(--even))}"


_VARIABLES = (
    ":root{color-scheme:light dark;--bg:#fff;--ink:#191d22;--soft:#5a636e;--line:#e4e7eb;--grid:#edeff2;"
    f"--panel:#f6f7f9;--warn:#d92d20;--rest:#c9cfd6;--under:59 125 201;--over:226 118 38;--even:0 0 0/.03;"
    f"{_colours(PALETTE_LIGHT)}{_diverging(LIGHT)}}}"
    "@media(prefers-color-scheme:dark){:root{--bg:#13161a;--ink:#e7e9ec;--soft:#9aa4af;--line:#2c3138;"
    "--grid:#22272d;--panel:#1b1f24;--warn:#ff6257;--rest:#4b545e;"
    "--under:72 143 224;--over:222 120 42;--even:255 255 255/.05;"
    f"{_colours(PALETTE_DARK)}{_diverging(DARK)}}}}}"
)

_PAGE = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums;overflow-wrap:break-word}
main{max-width:1120px;margin:0 auto;padding:40px clamp(16px,4vw,40px) 64px}
p{margin:0 0 12px;max-width:74ch}
header .kind{margin:0 0 4px;color:var(--soft);font-size:14px}
h1{font-size:clamp(28px,5vw,42px);line-height:1.15;font-weight:650;letter-spacing:-.02em;margin:0 0 12px;
overflow-wrap:anywhere}
header p{color:var(--soft)}
header p.lead{color:var(--ink);font-size:18px;margin-bottom:16px}
ul.health{list-style:none;margin:0 0 20px;padding:14px 18px;border:1px solid var(--line);border-radius:8px;
columns:2;column-gap:36px;font-size:15px;line-height:1.4}
.health li{position:relative;padding:3px 0 3px 24px;break-inside:avoid}
.health li::before{content:"\\2713";position:absolute;left:0;color:var(--c2);font-weight:700}
.health li.alarm::before{content:"!";left:4px;color:var(--warn)}
dl.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,190px),1fr));gap:24px 24px;
margin:28px 0 8px;padding:24px 0;border-top:1px solid var(--line);border-bottom:1px solid var(--line)}
dl.figures dt{color:var(--soft);font-size:14px}
dl.figures dd{margin:0;font-size:27px;line-height:1.25;font-weight:600;letter-spacing:-.01em}
dl.figures dd small{display:block;font-size:13px;font-weight:400;letter-spacing:0;color:var(--soft);
line-height:1.4}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;margin:16px 0 0;font-size:15px}
a{color:var(--c0);text-decoration:none;padding:4px 0}a:hover{text-decoration:underline}
.controls{position:sticky;top:0;z-index:5;display:flex;flex-wrap:wrap;align-items:center;gap:6px 24px;
margin:20px 0 0;padding:10px 0;background:var(--bg);border-bottom:1px solid var(--line);font-size:14px;
color:var(--soft)}
.controls[hidden]{display:none}section .controls{margin:0 0 28px}
.controls label{display:flex;align-items:center;gap:8px}.controls input{width:110px;accent-color:var(--c0)}
.choice{display:inline-flex;border:1px solid var(--line);border-radius:6px;overflow:hidden}
.choice button{font:inherit;color:var(--soft);background:none;border:0;padding:4px 12px;cursor:pointer}
.choice button+button{border-left:1px solid var(--line)}
.choice button[aria-pressed=true]{background:var(--panel);color:var(--ink);font-weight:600}
.marks{margin:-8px 0 28px;padding-left:1.4em;color:var(--soft);font-size:14px;columns:2;column-gap:40px}
.command code{font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
overflow-wrap:anywhere;color:var(--soft)}
section{margin-top:56px;scroll-margin-top:56px}
h2{font-size:24px;font-weight:650;letter-spacing:-.01em;margin:0 0 20px}
h3{font-size:17px;font-weight:600;margin:0}
.grid{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:44px 56px}
.wide,.block{grid-column:1/-1}
.block{margin-top:44px}.block p{color:var(--soft);font-size:15px;margin:4px 0 12px}
footer{margin-top:56px;padding-top:16px;border-top:1px solid var(--line);color:var(--soft);font-size:14px}
@media(max-width:760px){main{padding-top:24px}
ul.health{columns:1;padding:10px 12px;font-size:14px}.grid{grid-template-columns:minmax(0,1fr);
gap:40px}section{margin-top:44px}}
"""

_CHARTS = """
figure{margin:0;min-width:0}
.chart{display:flex;flex-direction:column}
.chart figcaption{display:grid;grid-template-columns:1fr auto;gap:0 16px;align-items:baseline;
margin-bottom:10px;flex:1;
align-content:start}
.chart .value{font-size:17px;font-weight:600}
.chart figcaption p{grid-column:1/-1;color:var(--soft);font-size:15px;margin:2px 0 0}
.frame{display:grid;grid-template-columns:44px minmax(0,1fr);grid-template-rows:24px var(--h,220px) 24px}
.frame.labelled{grid-template-columns:44px minmax(0,1fr) 120px}
.top{grid-row:1;grid-column:1/3;position:relative;margin-left:44px;font-size:12px;line-height:16px;color:var(--soft)}
.top b{position:absolute;transform:translateX(-50%);font-weight:600;top:2px}
.scale{position:absolute;right:100%;margin-right:6px;top:0;font:inherit;border:0;background:none;color:var(--soft);
padding:0;cursor:pointer;text-decoration:underline dotted;text-underline-offset:3px;white-space:nowrap}
.scale:hover{color:var(--ink)}
.plot{position:relative;border-bottom:1px solid var(--line);touch-action:pan-y}
.plot svg{position:absolute;inset:0;width:100%;height:100%;overflow:hidden;display:block}
.up{grid-row:2;grid-column:1}.plot{grid-row:2;grid-column:2}.ends{grid-column:3;grid-row:2}
.ends svg{position:absolute;left:1px;top:0;width:9px;height:100%}
.ends svg path{stroke:var(--soft);stroke-width:1;opacity:.6}
.frame:not(.labelled) .ends{display:none}
.up,.across,.ends{position:relative;font-size:12px;line-height:15px;color:var(--soft)}
.up span{position:absolute;right:8px;transform:translateY(50%);white-space:nowrap}
.across{grid-column:2;grid-row:3}
.across span{position:absolute;top:6px;transform:translateX(-50%);white-space:nowrap}
.across span.first{transform:none}.across span.last{transform:translateX(-100%)}
.across em{position:absolute;right:100%;margin-right:8px;top:6px;font-style:normal}
.ends span{position:absolute;left:12px;right:0;transform:translateY(-50%);white-space:nowrap;font-weight:600;
color:var(--c);overflow:hidden;text-overflow:ellipsis}
.ends .guide{font-weight:400;color:var(--soft)}
svg path{fill:none;vector-effect:non-scaling-stroke}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .guide{stroke:var(--soft);stroke-width:1;stroke-dasharray:5 4}
svg .target{fill:var(--c2);opacity:.16}
svg .curve{stroke:var(--c);stroke-width:1.6;stroke-linejoin:round}
svg .d1{stroke-dasharray:6 3}svg .d2{stroke-dasharray:2 3}svg .d3{stroke:none}
svg .mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:1 3}
.dim .plot g[data-run]{opacity:.15}.dim .plot g.lit{opacity:1}.dim .plot g.lit .curve{stroke-width:2.6}
.dim .ends span[data-run]{opacity:.3}.dim .ends span.lit{opacity:1}
tr.lit td{background:var(--panel)}
svg .envelope{fill:var(--c);opacity:.17}
svg .dots{stroke:var(--c);stroke-width:6;stroke-linecap:round}
svg .bundle{stroke:var(--c);stroke-width:1;opacity:.6;stroke-linejoin:round}
.cursor{position:absolute;top:0;bottom:0;width:1px;background:var(--soft);display:none;pointer-events:none}
.tip{position:absolute;z-index:2;pointer-events:none;background:var(--bg);border:1px solid var(--line);
border-radius:6px;
padding:6px 10px;font-size:13px;line-height:1.45;white-space:nowrap;box-shadow:0 4px 16px rgb(0 0 0/.12)}
.tip b{color:var(--c);font-weight:600}
.layers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:20px 24px}
.layer figcaption{font-size:13px;color:var(--soft);margin-bottom:4px}
.layer img{display:block;width:100%;height:150px;image-rendering:pixelated}
.layer .frame{grid-template-rows:0 120px 24px}
.key{display:inline-flex;flex-wrap:wrap;align-items:center;gap:0;color:var(--ink);margin-right:4px;
vertical-align:bottom}
.key i{font-style:normal}.key i:first-child{margin-right:8px}.key i:last-child{margin-left:8px}
.key b{width:22px;height:14px}.key b.diverging{width:120px;background:var(--map)}
"""

_TIMELINE = """
.timeline{margin-top:36px}
.timeline h4{margin:20px 0 6px;font-size:14px;font-weight:600}
.timeline h4 small{margin-left:12px;font-size:13px;font-weight:400;color:var(--soft)}
.tracks,.times{display:grid;grid-template-columns:84px minmax(0,1fr);gap:4px 8px;align-items:center}
.tracks .name,.times em{font-size:13px;font-style:normal;color:var(--soft);text-align:right}
.times .across{grid-column:2;grid-row:1;height:24px}.times em{font-size:12px}
.track{position:relative;height:22px;background:var(--panel);border-radius:3px;overflow:hidden}
.track svg{position:absolute;inset:0;width:100%;height:100%;display:block}
.track path{fill:var(--c);stroke:none}.track path.rest{fill:var(--rest)}.track path.blocked{fill:var(--warn)}
.track b{position:absolute;top:0;font-size:11px;line-height:22px;font-weight:500;color:var(--bg);padding:0 4px;
overflow:hidden;white-space:nowrap;text-overflow:ellipsis;pointer-events:none;text-align:center}
.track b.short{padding:0;text-overflow:clip}
.shares{display:flex;gap:1px;height:26px;border-radius:4px;overflow:hidden;margin:4px 0 10px}
.shares i{background:var(--c);min-width:1px}
.keys{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:14px;color:var(--soft);max-width:none}
.keys{margin-bottom:4px}.keys b{font-weight:400;width:112px;overflow-wrap:normal}
.keys i{display:inline-block;width:14px;height:14px;border-radius:3px;margin-right:6px;vertical-align:-2px;
background:var(--c)}
.keys i.rest{background:var(--rest)}.keys i.blocked{background:var(--warn)}
@media(max-width:760px){.tracks,.times{grid-template-columns:66px minmax(0,1fr);gap:3px 6px}
.tracks .name{font-size:12px}.track b.short{display:none}}
"""

_TEXT = """
.tokens{font:14px/1.75 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
white-space:pre-wrap;
overflow-wrap:anywhere;tab-size:4;margin:16px 0 0;padding:16px;border:1px solid var(--line);border-radius:8px;
max-height:640px;overflow-y:auto}
.tokens span{padding:2px 0}.tokens span:hover{outline:1px solid var(--ink)}
.tokens .nl::before{content:"\\21b5";opacity:.45}
p.legend{color:var(--soft);font-size:14px;overflow-wrap:anywhere}
details{border-top:1px solid var(--line)}details:last-of-type{border-bottom:1px solid var(--line)}
summary{cursor:pointer;padding:12px 0;font-weight:600}
.settings{columns:2;column-gap:56px;padding-bottom:20px}
.settings div{break-inside:avoid-column;margin-bottom:16px}
.settings h4{margin:0 0 4px;font-size:14px;color:var(--soft);font-weight:600}
.settings dl{margin:0;display:grid;grid-template-columns:minmax(0,auto) minmax(0,1fr);gap:0 16px;
font-size:14px}
.settings dd{margin:0;text-align:right;overflow-wrap:anywhere}
.settings dt{overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:15px;margin-bottom:8px}
th{font-weight:600;font-size:13px;color:var(--soft);text-align:right;vertical-align:bottom;
overflow-wrap:break-word}
th,td{padding:8px 0 8px 16px;border-bottom:1px solid var(--line)}
td{text-align:right}th:first-child,td:first-child{text-align:left;padding-left:0;overflow-wrap:anywhere}
.tag{font-weight:700;color:var(--c);margin-right:8px}
td.best{font-weight:650}
.scrolled{overflow-x:auto;margin-bottom:16px}
.scrolled td,.scrolled th{white-space:nowrap}.scrolled th{white-space:normal;min-width:64px}
.scrolled tr>:first-child{position:sticky;left:0;background:var(--bg);z-index:1;min-width:clamp(130px,20vw,220px);
overflow-wrap:anywhere;white-space:normal}
.dot{position:absolute;width:10px;height:10px;margin:0 0 -5px -5px;padding:0;border-radius:50%;background:var(--c);
box-shadow:0 0 0 1.5px var(--bg)}
.dot:hover,.dot.lit{width:14px;height:14px;margin:0 0 -7px -7px;z-index:1}
.sweep .frame{grid-template-rows:0 var(--h) 24px 24px}
.sweep .axis{grid-column:2;grid-row:4;text-align:center;font-size:12px;color:var(--soft);margin:0;max-width:none}
.across .choice-name{overflow:hidden;text-overflow:ellipsis;padding:0 3px}
@media(max-width:760px){.settings{columns:1}
.frame{grid-template-columns:36px minmax(0,1fr)}.frame.labelled{grid-template-columns:36px minmax(0,1fr) 100px}
.top{margin-left:36px}.frame.labelled .dense,.layer .dense{display:none}
.scale{font-size:11px;margin-right:3px}.across em{margin-right:4px}
.up span{right:5px}.marks{columns:1}
}
@media print{.tokens{max-height:none}}
"""


def style_sheet() -> str:
    """Return the style sheet."""
    classes = "".join(f".c{number}{{--c:var(--c{number})}}" for number in range(len(PALETTE_LIGHT)))
    return _VARIABLES + classes + _PAGE + _CHARTS + _TIMELINE + _TEXT + _token_levels()
