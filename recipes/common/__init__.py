"""What every recipe needs: flags and exit statuses, models and prompts, the output folder and its log, figures and pictures."""
