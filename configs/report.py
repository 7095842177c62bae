"""One page out of a study: report.html, which opens offline, report.md, and figures of their own.

python -m experiments.report --config=configs/report.py --config.study=runs/study-cpu/study.json
    10 s, any study.json of experiments.study.
"""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(study="runs/study-cpu/study.json", workdir="runs/report"))
