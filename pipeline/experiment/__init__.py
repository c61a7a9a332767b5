"""Experiments: students under parameters that vary, as tables and figures. No stage of `dvc repro`.

May import `attack`, `student`, `evaluate`, `prepare` and what these import.
"""
