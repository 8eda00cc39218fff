"""Evaluates a model on tasks that files describe: rows, prompts, answers, scores. docs/evaluation.md has the tasks."""
