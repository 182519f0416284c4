"""The page of a report: one HTML file with its style inside, nothing fetched from anywhere.

Light and dark by the reader's setting, one column on a phone. `report.py` fills the $places.
"""

from string import Template

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --wash: #f6f8fa;
  --good: #1a7f37; --bad: #b35900;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1318; --ink: #e6eaef; --soft: #9aa5b1; --line: #313943; --wash: #181e25;
    --good: #4cc26a; --bad: #f0a04b;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.25rem 1rem 4rem; max-width: 64rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 {
  font-size: 1.15rem; margin: 2.25rem 0 .5rem; padding-top: .5rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; overflow-wrap: anywhere; }
p { margin: .35rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.order { border-left: 4px solid var(--line); padding: .4rem .8rem; background: var(--wash); }
ul.order { padding-left: 1.8rem; max-width: 46rem; }
.order.holds { border-color: var(--good); }
.order.fails { border-color: var(--bad); }
.result-title { margin-top: 1rem; color: var(--soft); }
ul.result {
  display: flex; flex-wrap: wrap; gap: .5rem; margin: .25rem 0 .75rem; padding: 0;
  list-style: none;
}
ul.result li {
  flex: 1 1 7.5rem; padding: .5rem .75rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--wash); line-height: 1.25;
}
ul.result li.main { border-color: var(--soft); border-width: 2px; }
ul.result strong { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
ul.result span, ul.result small { display: block; font-size: .85rem; color: var(--soft); }
ul.result small { font-size: .8rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { display: block; font-size: .8rem; color: var(--soft); white-space: nowrap; }
.wide th:first-child, .wide td:first-child {
  position: sticky; left: 0; background: var(--paper);
}
table.facts td { text-align: left; overflow-wrap: anywhere; vertical-align: top; }
table.facts td:first-child { color: var(--soft); min-width: 10rem; }
table.probes td:nth-child(2) { min-width: 13rem; }
table.probes td:last-child { color: var(--soft); font-size: .85rem; }
pre { background: var(--wash); padding: .75rem; overflow-x: auto; font-size: .8rem; }
details summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin: .5rem 0; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; display: block; }
details pre { -webkit-user-select: all; user-select: all; }
.moving {
  display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
}
.moving figure { margin: .5rem 0; min-width: 0; }
.moving figcaption { overflow-wrap: anywhere; }
.panel {
  display: grid; grid-template-columns: 8.5rem repeat(var(--columns), minmax(0, 1fr));
  align-items: center; max-width: 46rem;
}
.panel .name {
  grid-column: 1 / span calc(1 + var(--free)); justify-self: end;
  padding-right: .6rem; font-size: .85rem; line-height: 1.2;
}
.panel .times {
  grid-column: 2 / -1; display: grid; grid-template-columns: repeat(var(--columns), 1fr);
  text-align: center; font-size: .75rem; color: var(--soft);
}
.panel img {
  grid-column: span var(--tiles) / -1; width: 100%; height: auto; display: block;
}
.legend {
  display: flex; flex-wrap: wrap; gap: .25rem .9rem; font-size: .85rem; margin: .5rem 0;
  padding: 0; list-style: none;
}
.legend i {
  display: inline-block; width: .8em; height: .8em; margin-right: .35em; border-radius: 2px;
}
@media (max-width: 40rem) {
  body { padding: 1rem .75rem 3rem; }
  th, td { padding: .3rem .25rem .3rem .4rem; }
  table { font-size: .8rem; }
  table.facts td:first-child { min-width: 6rem; }
  table.probes tr {
    display: grid; grid-template-columns: 1fr 1fr; border-bottom: 1px solid var(--line);
  }
  table.probes td, table.probes td:nth-child(2) { border: 0; min-width: 0; }
  table.probes td:last-child { grid-column: 1 / -1; padding: 0 0 .3rem; }
  td small { font-size: .7rem; }
  .plot img { max-width: none; width: 34rem; }
  .panel { grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
  .panel .times { grid-column: 1 / -1; }
  .panel .name { grid-column: 1 / -1; justify-self: start; padding-top: .35rem; }
  .panel .name.late { grid-column: 1 / span var(--free); justify-self: end; padding-top: 0; }
}
@media print { body { max-width: none; } details { display: none; } }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="soft">$summary</p>
$body
</main>
</body>
</html>
""")
