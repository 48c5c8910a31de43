"""Where the feed-forward layers of any transformers model are, and what they compute."""
