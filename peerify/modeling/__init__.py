"""What ships beside the weights of a converted model; nothing here imports the rest of peerify."""

# Whoever imports transformers first has peerify import modeling_peer.py as well. Were that one of the files here, it
# would be needed before it is complete.
import transformers  # noqa: F401
