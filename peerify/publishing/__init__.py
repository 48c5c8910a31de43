"""A converted model on the Hub, proven by loading it back."""
