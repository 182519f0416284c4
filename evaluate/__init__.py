"""Forecasts scored as the paper does, from caches, and looked at: the report and its pictures.

forecast.py    the protocol from a cache       rollout.py   samples -> features
protocol.py    crops, labels, metrics          probes.py    spread, best-of-k, use of the token
report.py      report.json and report.html     flops.py     GFLOPs of the real modules
page.py        parts of HTML pages
cache_fidelity.py  what a storage type costs
"""
