"""Dense model in, PEER model out."""
