"""What to do with a noise scale: batch sizes by plan or in closed loop, logs, export, and what another policy would have done."""
