"""The report: tables, plots and significance tests from a folder of results."""
