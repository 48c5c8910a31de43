"""What a person may ask for: options and recipes, checked."""
