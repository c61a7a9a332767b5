"""The report: one HTML file that shows what came out of a run of the pipeline."""
