"""Tasks: what a model of any size makes of the questions of lm-eval's tasks."""
