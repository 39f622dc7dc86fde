"""`llava-patch report`: every measurement of one checkpoint in one HTML file that needs nothing else."""
