"""What happens around a run: checks before it, its record, tracking, and what is shown at its end."""
