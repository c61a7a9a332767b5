"""Stage report: one HTML file that shows what came out of a run, and the data of its tables and charts.

May import all other rooms.
"""
