"""Measurements: ours against theirs in one run, as ratios. See RESULTS.md; run one as `python -m bench.work`."""
