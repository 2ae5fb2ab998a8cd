"""The parts of the report page: markup, charts, curves, pictures and sections."""
