"""A policy against a day that has happened, or may: requests with their times and lengths, engines and clouds as
models, and the same `decide()` that the server calls, in virtual time.

Bottom to top: `trace` and `synthetic` (who asks when, for how much), `mix` (which of it is private, and of which
latency class), `step` and `engine`, `cloud` (how long answers take), `fleetfile` (which of them there are), `routers`
(a policy, and what it is compared with), `world` (everything at once), `bound` (what could have come of it at best),
`score` (what came of it), `compare` and `difference` (several policies), `report` (tables and documents). README.md
beside this file has every option and a worked example.
"""
