"""One HTML file that a person opens: tables, charts, and an explorer of what attention keeps. No network, no build."""

from levattn.analysis.html.explorer import explorer_payload as explorer_payload
from levattn.analysis.html.page import page_bytes as page_bytes
from levattn.analysis.html.page import write_page as write_page
from levattn.analysis.html.read import read_measurements as read_measurements
