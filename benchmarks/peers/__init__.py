"""One adapter a peer: how another project builds and runs the same work."""
