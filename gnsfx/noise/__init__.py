"""From norms to a noise scale: estimators, intervals, what is kept over steps, and what is read of it."""
