"""The parts of the embedded data set: its drawings, the plan of its web, its pictures and its server."""
