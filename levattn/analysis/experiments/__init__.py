"""Experiments on what the theory promises: each gives rows of a table, and a picture of them."""

from levattn.analysis.experiments.run import EXPERIMENTS as EXPERIMENTS
from levattn.analysis.experiments.run import Experiment as Experiment
from levattn.analysis.experiments.run import print_rows as print_rows
from levattn.analysis.experiments.run import run_experiment as run_experiment
