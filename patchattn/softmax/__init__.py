"""What stands in the softmax and right behind it: slots, biases of keys, gates."""
