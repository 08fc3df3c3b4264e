"""The loop of a run: engine, step, schedules, metrics."""
