"""What came out of a run: tables, plots, a picture of what attention keeps, and a report. Nothing here trains."""

from levattn.analysis.picture import plot_attention as plot_attention
from levattn.analysis.plots import plot_accuracy as plot_accuracy
from levattn.analysis.report import findings as findings
from levattn.analysis.report import write_report as write_report
from levattn.analysis.results import read_results as read_results
from levattn.analysis.results import write_results as write_results
from levattn.analysis.rows import COLUMNS as COLUMNS
from levattn.analysis.rows import tidy_rows as tidy_rows
from levattn.analysis.tables import markdown_table as markdown_table
from levattn.analysis.tables import print_by_layer as print_by_layer
from levattn.analysis.tables import print_table as print_table
