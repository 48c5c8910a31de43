"""A page of what peerify's commands have written: read.py → content.py → figures.py → page.py. No model is run."""
