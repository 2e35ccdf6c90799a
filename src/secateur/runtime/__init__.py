"""Running a sub-model: loading it and generating text."""
