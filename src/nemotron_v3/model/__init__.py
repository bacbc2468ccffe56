"""The whole model: embed, loop over the blocks, head."""
