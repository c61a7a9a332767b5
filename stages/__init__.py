"""The commands of the pipeline: one module for each DVC stage, and a few that are no stage."""
