"""What stands in the softmax and right behind it: slots, biases of keys, rows of weights, gates."""
