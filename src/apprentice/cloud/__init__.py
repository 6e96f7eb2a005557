"""A stage on a machine that SkyPilot finds, and what a run will take."""
