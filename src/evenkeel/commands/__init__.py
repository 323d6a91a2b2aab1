"""The commands that work on a model: `evenkeel inspect`, `convert`, `fold` and `recalibrate`."""
