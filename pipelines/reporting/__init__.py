"""The parts of the report: figures and examples of a run's data, and pieces of an HTML page."""
