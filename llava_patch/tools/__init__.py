"""Jobs around checkpoints that measure no model: convert, inspect, doctor, report, bench, sweep."""
