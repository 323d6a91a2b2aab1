"""Running a model once and recording its calls."""
