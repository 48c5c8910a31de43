"""What ships beside the weights of a converted model; nothing here imports the rest of peerify."""
