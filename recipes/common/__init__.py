"""Shared by all recipes: flags and exit statuses, models and prompts, the output folder and its log, figures and pictures. Imports no other room."""
